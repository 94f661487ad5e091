// Open workflows in ComfyUI's page with headless Chromium and print, as JSON, what the page made of each.
//   PLAYWRIGHT_DIR=<folder with node_modules> CHROMIUM=<browser> node page.mjs ADDRESS PROFILE_FOLDER WORKFLOW.json ...
import fs from 'node:fs'
import path from 'node:path'
import { openBrowser } from './browser.mjs'

const [address, profile, ...workflows] = process.argv.slice(2)
const browser = await openBrowser(profile)
try {
  const page = browser.pages()[0] ?? (await browser.newPage())
  await page.route('**/*', route => (route.request().url().startsWith('http') && !route.request().url().startsWith(address) ? route.abort() : route.continue()))
  await page.goto(address, { waitUntil: 'domcontentloaded', timeout: 90000 })
  await page.waitForFunction(() => window.app?.graph && window.app.canvas && window.LiteGraph?.registered_node_types?.WanS2VSample, null, { timeout: 90000 })
  await page.waitForTimeout(1500)
  let errors = []
  page.on('pageerror', error => errors.push(String(error)))
  const open = graph => page.evaluate(async graph => {
    await window.app.loadGraphData(graph, true, true, 'test')
    const slots = list => (list ?? []).map(slot => [slot.name, slot.label ?? slot.localized_name ?? slot.name])
    const nodes = window.app.graph.nodes.map(node => ({
      type: node.type,
      title: node.title,
      known: node.type in window.LiteGraph.registered_node_types,
      category: window.LiteGraph.registered_node_types[node.type]?.category,
      widgets: (node.widgets ?? []).map(widget => [widget.name, widget.label ?? widget.name]),
      inputs: slots(node.inputs),
      outputs: slots(node.outputs),
    }))
    return { nodes, prompt: (await window.app.graphToPrompt()).output, version: window.__COMFYUI_FRONTEND_VERSION__ }
  }, graph)
  const pages = {}
  for (const workflow of workflows) {
    errors = []
    const made = await open(JSON.parse(fs.readFileSync(workflow, 'utf8')))
    pages[path.basename(workflow, '.json')] = { ...made, errors }
  }
  console.log(JSON.stringify(pages))
} finally {
  await browser.close()
}
