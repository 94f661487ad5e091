// A headless Chromium, for the scripts beside this one.
//   PLAYWRIGHT_DIR=<folder with node_modules> CHROMIUM=<browser>
import path from 'node:path'
import { createRequire } from 'node:module'

export function openBrowser(profile) {
  const { chromium } = createRequire(path.join(process.env.PLAYWRIGHT_DIR, 'x.js'))('playwright-core')
  return chromium.launchPersistentContext(profile, {
    executablePath: process.env.CHROMIUM,
    headless: true,
    viewport: { width: 1600, height: 1000 },
    args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking'],
  })
}
