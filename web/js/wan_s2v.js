// The timeline in Wan S2V Conditioning and Wan S2V Talking Video, finished clips in Wan S2V Sample, and the forecast in
// Wan S2V Memory. What the page lacks is left out.
import { api } from '../../../scripts/api.js'
import { app } from '../../../scripts/app.js'
import { ClipPlayer } from './clip_player.js'
import { nodeOf, sourceOf } from './graph.js'
import { MemoryPanel } from './memory.js'
import './talking_video.js' // first: the button that it adds stands above the timeline
import { Timeline } from './timeline.js'

const timelines = new Map()
const players = new Map()
const panels = new Map()

/** Run what the page may not be ready for: the workflow matters more than what is drawn into it. */
function careful(work) {
  try {
    work()
  } catch (error) {
    console.warn('Wan S2V:', error)
  }
}

/** Do something more in a callback of a node. */
function alongside(node, name, work) {
  const before = node[name]
  node[name] = function (...values) {
    const result = before?.apply(this, values)
    careful(() => work(...values))
    return result
  }
}

/** Let a node have a widget of its own for as long as it lives. */
function attach(widgets, Widget, node) {
  const widget = new Widget(node)
  widgets.set(node, widget)
  alongside(node, 'onRemoved', () => {
    widget.remove()
    widgets.delete(node)
  })
}

function showClip(message) {
  const node = nodeOf(message.node)
  players.get(node)?.follow(message)
  const timeline = timelines.get(node) ?? timelines.get(sourceOf(node, 'conditioning'))
  timeline?.follow(message)
}

app.registerExtension({
  name: 'WanS2V.Seeing',
  setup() {
    api.addEventListener('wan_s2v.timeline', ({ detail }) => careful(() => timelines.get(nodeOf(detail.node))?.show(detail.plan)))
    api.addEventListener('wan_s2v.clip', ({ detail }) => careful(() => showClip(detail)))
    for (const ending of ['execution_success', 'execution_error', 'execution_interrupted']) {
      api.addEventListener(ending, () => careful(() => {
        timelines.forEach(timeline => timeline.rest())
        panels.forEach(panel => panel.renew())
      }))
    }
  },
  nodeCreated(node) {
    const widget = {
      WanS2VConditioning: [timelines, Timeline],
      WanS2VTalkingVideo: [timelines, Timeline],
      WanS2VSample: [players, ClipPlayer],
      WanS2VMemory: [panels, MemoryPanel],
    }[node.comfyClass]
    if (widget && node.addDOMWidget) careful(() => attach(...widget, node))
  },
})
