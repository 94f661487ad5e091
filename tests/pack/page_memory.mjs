// Open a workflow with Wan S2V Memory in ComfyUI's page with headless Chromium and print, as JSON, what its panel shows
// while the graph is changed.
//   PLAYWRIGHT_DIR=<folder of playwright-core> CHROMIUM=<browser> [SCREENSHOTS=<folder>] \
//     node page_memory.mjs ADDRESS PROFILE_FOLDER WORKFLOW.json NAME
import fs from 'node:fs'
import path from 'node:path'
import { openPage, wait } from './browser.mjs'

const [address, profile, workflow, name] = process.argv.slice(2)
const { browser, page, errors } = await openPage(address, profile)
const asked = []
page.on('request', request => request.url().includes('/wan_s2v/memory') && asked.push(request.url()))
const told = () => page.evaluate(() => {
  const panel = document.querySelector('.wan-s2v-memory')
  if (!panel) return null
  const stages = [...panel.querySelectorAll('.wan-s2v-stage')].map(row => ({
    lines: row.innerText.split('\n').filter(Boolean),
    share: row.children.length > 1 ? row.children[1].firstChild.getBoundingClientRect().width / row.children[1].getBoundingClientRect().width : null,
  }))
  return { text: panel.innerText, stages, fits: panel.firstChild.offsetHeight <= panel.clientHeight + 1 }
})
/** What the panel shows after something has changed. */
const says = async (work, value, isEnd = () => true) => {
  const before = (await told())?.text
  await page.evaluate(work, value)
  const isNew = seen => seen && seen.text !== before && !seen.text.includes('…') && isEnd(seen)
  if (!(await wait(async () => isNew(await told()), 30))) return null
  await page.waitForTimeout(300) // the node grows when the canvas is drawn
  return told()
}
const set = ([type, values]) => {
  const node = window.app.graph.nodes.find(node => node.type === type)
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets.find(widget => widget.name === name)
    widget.value = value
    widget.callback?.(value)
  }
}
const show = async part => {
  if (!process.env.SCREENSHOTS) return
  await page.evaluate(() => {
    const { app } = window
    const node = app.graph.nodes.find(node => node.type === 'WanS2VMemory')
    const view = app.canvas.ds
    view.scale = 1
    view.offset[0] = 800 - node.pos[0] - node.size[0] / 2
    view.offset[1] = 160 - node.pos[1]
    app.canvas.setDirty(true, true)
  })
  await page.waitForTimeout(1000)
  await page.screenshot({ path: path.join(process.env.SCREENSHOTS, `${name}_${part}.png`) })
}
try {
  const graph = JSON.parse(fs.readFileSync(workflow, 'utf8'))
  const seen = {}
  seen.opened = await says(graph => window.app.loadGraphData(graph, true, true, 'test'), graph, seen => seen.stages.length)
  await show('opened')
  seen.large = await says(set, ['WanS2VConditioning', { width: 1280, height: 720 }])
  seen.tight = await says(set, ['WanS2VMemory', { profile: 'custom', vram_limit_gb: 3.5 }])
  await show('tight')
  seen.small = await says(set, ['WanS2VMemory', { vram_limit_gb: 1 }])
  await show('small')
  seen.preset = await says(() => {
    const { app, LiteGraph } = window
    const memory = app.graph.nodes.find(node => node.type === 'WanS2VMemory')
    memory.widgets.find(widget => widget.name === 'vram_limit_gb').value = 24
    const kinds = ['WanS2VSpeed', 'WanS2VModelPair', 'WanS2VExperts', 'WanS2VNoise']
    const onTheWay = kinds.map(kind => LiteGraph.createNode(kind))
    const [speed] = onTheWay
    const preset = LiteGraph.createNode('WanS2VSamplingPreset')
    for (const node of [...onTheWay, preset]) app.graph.add(node)
    const sampler = app.graph.nodes.find(node => node.type === 'WanS2VSample')
    const slot = (node, name) => node.inputs.findIndex(input => input.name === name)
    const line = [memory, ...onTheWay, sampler]
    line.slice(1).forEach((node, before) => line[before].connect(0, node, slot(node, 'model')))
    speed.widgets.find(widget => widget.name === 'vae').value = 'float32'
    preset.connect(1, sampler, slot(sampler, 'guidance_scale'))
  })
  await page.waitForTimeout(1500) // the page asks when nothing has changed for a moment
  const last = Object.fromEntries(new URL(asked.at(-1)).searchParams)
  seen.alone = await says(() => {
    const node = window.app.graph.nodes.find(node => node.type === 'WanS2VMemory')
    node.disconnectOutput(0)
  })
  seen.unloaded = await says(() => window.app.graph.nodes.find(node => node.type === 'WanS2VMemory').disconnectInput(0))
  const saved = (await page.evaluate(() => window.app.graph.serialize())).nodes.find(node => node.type === 'WanS2VMemory')
  console.log(JSON.stringify({ errors, seen, last, values: saved.widgets_values }))
} finally {
  await browser.close()
}
