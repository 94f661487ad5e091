// What the graph on the canvas says before it runs. Whatever is not understood is null: nothing is guessed.
import { app } from '../../../scripts/app.js'

const ACTIVE = 0
const TALKING = 'WanS2VTalkingVideo'
const PLAN_INPUTS = ['fps', 'clip_frames', 'max_clips', 'timing', 'clip_plan', 'start_from_picture']

/** The node of an id that the server uses; "12:5" is node 5 in the subgraph of node 12. */
export function nodeOf(id) {
  const path = String(id).split(':')
  let graph = app.rootGraph ?? app.graph
  for (const outer of path.slice(0, -1)) graph = graph?.getNodeById(outer)?.subgraph
  return graph?.getNodeById(path.at(-1)) ?? null
}

/** The node that an input is connected to, behind reroutes; null if there is none, or if it will not run. */
export function sourceOf(node, name) {
  const link = node?.inputs?.find(input => input.name === name)?.link
  if (link == null) return null
  const links = node.graph?.links
  const found = links?.get?.(link) ?? links?.[link]
  const source = node.graph?.getNodeById(found?.origin_id)
  if (source?.type === 'Reroute') return sourceOf(source, source.inputs?.[0]?.name)
  return source && (source.mode ?? ACTIVE) === ACTIVE ? source : null
}

/** The value of a widget, or of the primitive node that sets it; undefined where it is not known yet. */
function valueOf(node, name) {
  const slot = node.inputs?.find(input => input.name === name)
  if (slot?.link != null) {
    const source = sourceOf(node, name)
    return String(source?.type).startsWith('Primitive') ? source.widgets?.[0]?.value : undefined
  }
  return node.widgets?.find(widget => widget.name === name)?.value
}

function valuesOf(node, names) {
  const values = Object.fromEntries(names.map(name => [name, valueOf(node, name)]))
  return Object.values(values).includes(undefined) ? null : values
}

/** What to ask the server for the timeline of a node that shows one; null where only the run can tell. */
export function questionOf(node) {
  const parts = node.comfyClass === TALKING ? partsOfTalking(node) : partsOfConditioning(node)
  if (!parts || parts.includes(null)) return null
  return new URLSearchParams(Object.assign({}, ...parts)).toString()
}

function partsOfConditioning(node) {
  const voice = sourceOf(node, 'voice')
  const hears = { WanS2VEncodeAudio: ['start_seconds', 'seconds'], WanS2VVoiceFromEncoder: [] }[voice?.type]
  return hears && [recordingOf(sourceOf(voice, 'audio')), valuesOf(voice, hears), valuesOf(node, PLAN_INPUTS)]
}

/** All else is as the nodes have it, which the server knows. */
function partsOfTalking(node) {
  if (node.inputs?.find(input => input.name === 'audio')?.link != null) return [recordingOf(sourceOf(node, 'audio'))]
  const audio = valueOf(node, 'voice')
  return [audio === undefined ? null : { audio }]
}

function recordingOf(source) {
  if (source?.type === 'WanS2VDemoInputs') return { demo: '1' }
  return source?.type === 'LoadAudio' ? valuesOf(source, ['audio']) : null
}
