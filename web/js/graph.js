// What the graph on the canvas says before it runs. Whatever is not understood is null: nothing is guessed.
import { app } from '../../../scripts/app.js'

const ACTIVE = 0
const TALKING = 'WanS2VTalkingVideo'
const ON_THE_WAY = ['Reroute', 'WanS2VSpeed', 'WanS2VMemory', 'WanS2VModelPair', 'WanS2VExperts', 'WanS2VNoise']
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

const LOADERS = { WanS2VLoadCheckpoint: 'checkpoint', WanS2VLoadModel: 'name', WanS2VLoadTextEncoder: 'name', WanS2VLoadAudioEncoder: 'name', WanS2VLoadVAE: 'name' }
const LIMITS = ['profile', 'vram_limit_gb', 'resident_blocks', 'slice_tokens', 'vae_tile', 'weights']
const SPEED = ['attention', 'sparse_keep', 'fused']

/** The sampler that an output leads to, behind reroutes and nodes that change how its model runs. */
function samplerOf(node) {
  for (const link of node?.outputs?.[0]?.links ?? []) {
    const links = node.graph?.links
    const target = node.graph?.getNodeById((links?.get?.(link) ?? links?.[link])?.target_id)
    if ((target?.mode ?? ACTIVE) !== ACTIVE) continue
    if (target?.type === 'WanS2VSample') return target
    const found = ON_THE_WAY.includes(target?.type) && samplerOf(target)
    if (found) return found
  }
  return null
}

/** What to ask the server for the forecast of a memory node: {query, missing}, the inputs that only the run can tell and
 * that the server takes as usual; null without a model. */
export function memoryQuestionOf(node) {
  const sampler = samplerOf(node)
  const models = [] // from the sampler back to the loader
  for (let at = sampler ?? node; at; at = sourceOf(at, 'model')) models.push(at)
  const facts = new Facts()
  facts.network(models.at(-2), 'model')
  if (!facts.query.model) return null
  facts.take(node, LIMITS)
  const speed = models.find(({ type }) => type === 'WanS2VSpeed')
  if (speed) facts.take(speed, SPEED, { vae: 'vae_precision' })
  if (sampler) addSampler(facts, sampler)
  else facts.missing.push('Wan S2V Sample')
  return { query: new URLSearchParams(facts.query).toString(), missing: facts.missing }
}

function addSampler(facts, sampler) {
  facts.take(sampler, ['precision', 'audio_guidance_scale'])
  const preset = sourceOf(sampler, 'guidance_scale')
  if (preset?.type === 'WanS2VSamplingPreset') facts.take(preset, ['preset'])
  else facts.take(sampler, ['guidance_scale'])
  facts.network(sampler, 'vae')
  const job = sourceOf(sampler, 'conditioning')
  if (job?.type !== 'WanS2VConditioning') return facts.missing.push('conditioning')
  facts.take(job, ['width', 'height', 'size_rule', 'clip_frames'])
  facts.query.has_pose = job.inputs.find(input => input.name === 'pose_video')?.link != null
  const [voice, text] = [sourceOf(job, 'voice'), sourceOf(job, 'positive')]
  if (voice?.type === 'WanS2VEncodeAudio') {
    facts.network(voice, 'audio_encoder')
    const sound = [recordingOf(sourceOf(voice, 'audio')), valuesOf(voice, ['start_seconds', 'seconds'])]
    if (sound.includes(null)) facts.missing.push('audio')
    else Object.assign(facts.query, ...sound)
  }
  if (text?.type === 'WanS2VEncodeText') {
    facts.network(text, 'text_encoder')
    facts.take(text, ['text_precision'], { device: 'text_device' })
  }
}

class Facts {
  query = {}
  missing = []

  /** The values of inputs, under the same or other names. */
  take(source, names, others = {}) {
    for (const [name, key] of [...names.map(name => [name, name]), ...Object.entries(others)]) {
      const value = valueOf(source, name)
      if (value === undefined) this.missing.push(name)
      else this.query[key] = value
    }
  }

  /** The name of the network that an input is given. */
  network(node, input) {
    const loader = sourceOf(node, input)
    const name = loader && LOADERS[loader.type] && valueOf(loader, LOADERS[loader.type])
    if (name) this.query[input] = name
    else this.missing.push(input)
  }
}
