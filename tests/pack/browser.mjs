// A headless Chromium with ComfyUI's page in it, for the scripts beside this one.
//   PLAYWRIGHT_DIR=<folder of playwright-core> CHROMIUM=<browser>
import { createRequire } from 'node:module'

const READY = () => window.app?.graph && window.app.canvas && window.LiteGraph?.registered_node_types?.WanS2VSample

/** A list that takes what goes wrong with files, routes and scripts of this pack. */
function oursGoneWrong(page) {
  const errors = []
  const isOurs = text => /wan_s2v|Wan S2V|clip_\d{4}/.test(text)
  page.on('console', message => {
    const text = `${message.text()} ${message.location().url}`
    if (['error', 'warning'].includes(message.type()) && isOurs(text)) errors.push(text)
  })
  page.on('response', response => response.status() >= 400 && isOurs(response.url()) && errors.push(`${response.status()} ${response.url()}`))
  return errors
}

/** Open the page at an address, and nothing beyond it; `screen` is its size in pixels. -> {browser, page, errors} */
export async function openPage(address, profile, screen = { width: 1600, height: 1000 }) {
  const { chromium } = createRequire(import.meta.url)(process.env.PLAYWRIGHT_DIR)
  const browser = await chromium.launchPersistentContext(profile, {
    executablePath: process.env.CHROMIUM,
    headless: true,
    viewport: screen,
    args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking'],
  })
  const page = browser.pages()[0] ?? (await browser.newPage())
  const isOutside = url => url.startsWith('http') && !url.startsWith(address)
  await page.route('**/*', route => (isOutside(route.request().url()) ? route.abort() : route.continue()))
  const errors = oursGoneWrong(page)
  await page.goto(address, { waitUntil: 'domcontentloaded', timeout: 90000 })
  await page.waitForFunction(READY, null, { timeout: 90000 })
  await page.waitForTimeout(1500)
  page.on('pageerror', error => errors.push(String(error?.stack ?? error))) // frontends throw some while they start
  return { browser, page, errors }
}

/** What `look` sees, as soon as it is something. */
export async function wait(look, seconds) {
  const end = Date.now() + seconds * 1000
  let seen = await look()
  while (!seen && Date.now() < end) {
    await new Promise(resolve => setTimeout(resolve, 50))
    seen = await look()
  }
  return seen
}
