// The timeline in Wan S2V Conditioning, and finished clips in Wan S2V Sample. What the page lacks is left out.
import { api } from '../../../scripts/api.js'
import { app } from '../../../scripts/app.js'
import { ClipPlayer } from './clip_player.js'
import { nodeOf, sourceOf } from './graph.js'
import { Timeline } from './timeline.js'

const timelines = new Map()
const players = new Map()

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

function addTimeline(node) {
  const timeline = new Timeline(node)
  timelines.set(node, timeline)
  alongside(node, 'onRemoved', () => {
    timeline.remove()
    timelines.delete(node)
  })
}

function addPlayer(node) {
  const player = new ClipPlayer(node)
  players.set(node, player)
  alongside(node, 'onRemoved', () => {
    player.stop()
    players.delete(node)
  })
}

function showClip(message) {
  const sampler = nodeOf(message.node)
  players.get(sampler)?.follow(message)
  timelines.get(sourceOf(sampler, 'conditioning'))?.follow(message)
}

app.registerExtension({
  name: 'WanS2V.Seeing',
  setup() {
    api.addEventListener('wan_s2v.timeline', ({ detail }) => careful(() => timelines.get(nodeOf(detail.node))?.show(detail.plan)))
    api.addEventListener('wan_s2v.clip', ({ detail }) => careful(() => showClip(detail)))
    for (const ending of ['execution_success', 'execution_error', 'execution_interrupted']) {
      api.addEventListener(ending, () => careful(() => timelines.forEach(timeline => timeline.rest())))
    }
  },
  nodeCreated(node) {
    const add = { WanS2VConditioning: addTimeline, WanS2VSample: addPlayer }[node.comfyClass]
    if (add && node.addDOMWidget) careful(() => add(node))
  },
})
