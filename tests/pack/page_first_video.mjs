// What a newcomer does with headless Chromium in ComfyUI's page: drop a graph on an empty canvas, choose a picture and a
// voice, press Run, and wait until the video plays. Prints as JSON what it took and what was seen.
//   PLAYWRIGHT_DIR=<folder of playwright-core> CHROMIUM=<browser> [SCREENSHOTS=<folder>] \
//     node page_first_video.mjs ADDRESS PROFILE_FOLDER GRAPH.json PICTURE VOICE NAME
import path from 'node:path'
import { openPage, wait } from './browser.mjs'

const [address, profile, graph, picture, voice, name] = process.argv.slice(2)
const { browser, page, errors } = await openPage(address, profile, { width: 1000, height: 900 })
const taken = { drags: 0, picks: 0, presses: 0 }
let pictures = 0

const show = async part => {
  if (!process.env.SCREENSHOTS) return
  await page.waitForTimeout(600)
  const file = `${name}_${++pictures}_${part}.jpg`
  await page.screenshot({ path: path.join(process.env.SCREENSHOTS, file), type: 'jpeg', quality: 66 })
}

/** Drop a file from outside of the browser, as a file manager does. */
async function drop(file, x, y) {
  const tools = await page.context().newCDPSession(page)
  const data = { items: [], files: [path.resolve(file)], dragOperationsMask: 1 }
  for (const type of ['dragEnter', 'dragOver', 'drop']) await tools.send('Input.dispatchDragEvent', { type, x, y, data })
  taken.drags++
}

/** Choose a file in what opens when something is clicked. */
async function pick(file, click) {
  const [chooser] = await Promise.all([page.waitForEvent('filechooser', { timeout: 10000 }), click()])
  await chooser.setFiles(file)
  taken.picks++
}

async function clickButton(input, button) {
  const row = page.locator(`[data-node-id] [data-widget-name="${input}"]`)
  if (await row.count()) return row.locator('label:has(input[type=file]), button:has(.icon-\\[lucide--folder-search\\])').first().click()
  const place = await page.evaluate(button => {
    const { canvas, graph } = window.app
    const node = graph.nodes.find(node => node.type === 'WanS2VTalkingVideo')
    const widget = node.widgets.find(widget => widget.name === button)
    const [x, y] = canvas.ds.convertOffsetToCanvas([node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10])
    const box = canvas.canvas.getBoundingClientRect()
    return [box.left + x, box.top + y]
  }, button)
  return page.mouse.click(...place)
}

const node = () => page.evaluate(() => {
  const node = window.app.graph.nodes.find(node => node.type === 'WanS2VTalkingVideo')
  return node && Object.fromEntries(node.widgets.map(widget => [widget.name, widget.value]))
})
const told = () => page.evaluate(() => document.querySelector('.wan-s2v-timeline')?.innerText ?? '')
const preview = () => page.evaluate(() => {
  const node = window.app.graph.nodes.find(node => node.type === 'WanS2VTalkingVideo')
  const shown = [...(node.imgs ?? []), ...document.querySelectorAll('[data-node-id] img')]
  return shown.find(image => image.src.startsWith('blob:') && image.naturalWidth)?.naturalWidth
})
const video = () => page.evaluate(() => {
  const video = [...document.querySelectorAll('video')].find(video => video.currentSrc.includes('/view?') && video.readyState >= 2)
  return video && { width: video.videoWidth, height: video.videoHeight, seconds: video.duration, at: video.currentTime, source: video.currentSrc, paused: video.paused, box: video.getBoundingClientRect().toJSON() }
})

try {
  await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow'))
  const before = await page.evaluate(() => window.app.graph.nodes.length)
  await show('empty')
  const began = Date.now()

  await drop(graph, 500, 400)
  const planned = await wait(async () => (await told()).includes('\n') && told(), 20)
  await show('graph')

  const demo = await node()
  await pick(picture, () => clickButton('picture', 'upload'))
  await wait(async () => (await node()).picture !== demo.picture, 10)
  await pick(voice, () => clickButton('voice', 'upload_voice'))
  await wait(async () => (await node()).voice !== demo.voice, 10)
  const heard = await wait(async () => (await told()) !== planned && told(), 10)
  const chosen = await node()
  await show('files')

  await page.evaluate(() => {
    const ended = (window.ended = { status: null })
    for (const kind of ['success', 'error', 'interrupted']) window.app.api.addEventListener(`execution_${kind}`, () => (ended.status = kind))
  })
  await page.locator('[data-testid=queue-button]').first().click()
  taken.presses++
  const seen = await wait(async () => {
    const [width, state] = [await preview(), await told()]
    return width && /clip (\d+) of \1, step ([6-9]|1\d)/.test(state) ? { width, state } : null
  }, 300)
  await show('running')

  const status = await wait(() => page.evaluate(() => window.ended.status), 180)
  let asked = Date.now()
  const playing = await wait(async () => {
    const now = await video()
    if (now?.at > 0) return now
    if (!now?.paused || Date.now() - asked < 3000) return null // it may start by itself, and its node may still grow
    await page.mouse.click(now.box.x + 16, now.box.y + now.box.height - 36) // the play button
    taken.presses++
    asked = Date.now()
    return null
  }, 60)
  const seconds = (Date.now() - began) / 1000
  await page.mouse.click(850, 700) // beside the nodes: none is selected
  await show('finished')
  const finished = await told()
  const version = await page.evaluate(() => window.__COMFYUI_FRONTEND_VERSION__)
  console.log(JSON.stringify({ version, errors, before, ...taken, seconds, planned, heard, chosen, seen, status, playing, finished }))
} finally {
  await browser.close()
}
