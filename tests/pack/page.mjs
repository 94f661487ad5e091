// Open workflows in ComfyUI's page with headless Chromium and print, as JSON, what the page made of each.
//   PLAYWRIGHT_DIR=<folder of playwright-core> CHROMIUM=<browser> node page.mjs ADDRESS PROFILE_FOLDER WORKFLOW.json ...
import fs from 'node:fs'
import path from 'node:path'
import { openPage } from './browser.mjs'

const [address, profile, ...workflows] = process.argv.slice(2)
const { browser, page, errors } = await openPage(address, profile)
try {
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
    const made = await open(JSON.parse(fs.readFileSync(workflow, 'utf8')))
    pages[path.basename(workflow, '.json')] = { ...made, errors: errors.splice(0) }
  }
  console.log(JSON.stringify(pages))
} finally {
  await browser.close()
}
