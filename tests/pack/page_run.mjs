// Open the demo in ComfyUI's page with headless Chromium, shrunk to several quick clips, queue it, and print as JSON what
// the timeline and the clip player showed before, while and after it ran.
//   PLAYWRIGHT_DIR=<folder of playwright-core> CHROMIUM=<browser> [SCREENSHOTS=<folder>] \
//     node page_run.mjs ADDRESS PROFILE_FOLDER WORKFLOW.json NAME '{"Node type": {"widget": value}}' SOUND
// SOUND is in the input folder; at the end Load Audio is connected with it.
import fs from 'node:fs'
import path from 'node:path'
import { openPage, wait } from './browser.mjs'

const [address, profile, workflow, name, changes, sound] = process.argv.slice(2)
const { browser, page, errors } = await openPage(address, profile)
try {
  const show = async (part, scale, type) => {
    await page.evaluate(([scale, type]) => {
      const { app } = window
      const node = app.graph.nodes.find(node => node.type === type)
      const view = app.canvas.ds
      view.scale = scale
      view.offset[0] = app.canvas.canvas.width / devicePixelRatio / scale / 2 - node.pos[0] - node.size[0] / 2
      view.offset[1] = 120 / scale - node.pos[1]
      app.canvas.setDirty(true, true)
    }, [scale, type])
    if (!process.env.SCREENSHOTS) return
    await page.waitForTimeout(1000)
    await page.screenshot({ path: path.join(process.env.SCREENSHOTS, `${name}_${part}.png`) })
  }
  const told = () => page.evaluate(() => document.querySelector('.wan-s2v-timeline')?.innerText ?? '')
  /** Wait until the timeline says something else than before. */
  const news = before => wait(async () => { const text = await told(); return text !== before && text.includes('\n') ? text : null }, 30)
  const change = changes => page.evaluate(changes => {
    for (const node of window.app.graph.nodes) {
      for (const [name, value] of Object.entries(changes[node.type] ?? {})) {
        const widget = node.widgets.find(widget => widget.name === name)
        widget.value = value
        widget.callback?.(value)
      }
    }
  }, changes)

  await page.evaluate(graph => window.app.loadGraphData(graph, true, true, 'test'), JSON.parse(fs.readFileSync(workflow, 'utf8')))
  const demo = await news('')
  await show('before', 1, 'WanS2VConditioning')
  await change(JSON.parse(changes))
  const shrunk = await news(demo)
  await page.waitForTimeout(1000) // a question to the server is asked when settings have been the same for 0.4 s
  const settled = await told()
  const { output } = await page.evaluate(() => window.app.graphToPrompt())
  await show('start', 0.7, 'WanS2VConditioning')
  await page.evaluate(() => {
    const ended = (window.ended = { status: null })
    for (const kind of ['success', 'error', 'interrupted']) window.app.api.addEventListener(`execution_${kind}`, () => (ended.status = kind))
    window.app.queuePrompt(0)
  })
  const playing = () => page.evaluate(() => {
    const video = document.querySelector('.wan-s2v-clips video')
    const isPlaying = video && video.readyState >= 2 && !video.paused && video.currentTime > 0
    return isPlaying ? { ended: window.ended.status, width: video.videoWidth, seconds: video.duration, muted: video.muted, label: document.querySelector('.wan-s2v-clips').innerText, told: document.querySelector('.wan-s2v-timeline').innerText } : null
  })
  const during = await wait(playing, 120)
  await show('during', 0.7, 'WanS2VSample')
  const status = await wait(() => page.evaluate(() => window.ended.status), 240)
  await page.waitForTimeout(500)
  const after = await told()
  await show('after', 1, 'WanS2VSample')
  const others = await page.evaluate(() => new Promise(resolve => {
    const video = document.querySelector('.wan-s2v-clips video')
    const seen = new Set()
    if (!video) return resolve([])
    const end = setTimeout(() => resolve([...seen]), 8000)
    video.addEventListener('playing', () => {
      seen.add(new URL(video.src).searchParams.get('filename'))
      if (seen.size < 2) return
      clearTimeout(end)
      resolve([...seen])
    })
  }))
  const graph = await page.evaluate(() => window.app.graph.serialize())
  const nodes = Object.fromEntries(graph.nodes.map(node => [node.type, { values: node.widgets_values, size: node.size }]))

  /** What the timeline says after something else is connected or chosen. */
  const says = async (work, value) => {
    const before = await told()
    await page.evaluate(work, value)
    return wait(async () => { const text = await told(); return text !== before && !/…|\.{3}/.test(text) ? text : null }, 30)
  }
  const other = {}
  if (sound) {
    const choose = sound => (window.loader.widgets.find(widget => widget.name === 'audio').value = sound)
    other.absent = await says(() => {
      const { app, LiteGraph } = window
      const encoder = app.graph.nodes.find(node => node.type === 'WanS2VEncodeAudio')
      window.loader = LiteGraph.createNode('LoadAudio')
      app.graph.add(window.loader)
      window.loader.pos = [encoder.pos[0] - 340, encoder.pos[1] + 40]
      window.loader.connect(0, encoder, encoder.inputs.findIndex(input => input.name === 'audio'))
      window.loader.widgets.find(widget => widget.name === 'audio').value = 'absent.wav'
    })
    await show('absent', 1, 'WanS2VConditioning')
    other.chosen = await says(choose, sound)
    other.whole = await says(() => (window.app.graph.nodes.find(node => node.type === 'WanS2VConditioning').widgets.find(widget => widget.name === 'max_clips').value = 0))
    await page.evaluate(() => {
      const node = window.app.graph.nodes.find(node => node.type === 'WanS2VConditioning')
      node.setSize([520, node.size[1] + 90])
      window.app.canvas.setDirty(true, true)
    })
    await show('whole', 1, 'WanS2VConditioning')
    other.muted = await says(() => (window.loader.mode = 2))
    await show('unknown', 1, 'WanS2VConditioning')
  }
  const version = await page.evaluate(() => window.__COMFYUI_FRONTEND_VERSION__)
  console.log(JSON.stringify({ version, errors, demo, shrunk, settled, during, status, after, others, other, nodes, prompt: output }))
} finally {
  await browser.close()
}
