// The forecast in Wan S2V Memory: what each stage of a run will take of the card, as the server would plan it now.
import { api } from '../../../scripts/api.js'
import { addWidget, element, growToFit, MARGIN } from './elements.js'
import { memoryQuestionOf } from './graph.js'
import { say } from './texts.js'

const LOOK_MS = 400
const HEIGHT = 150
const COLOURS = { fits: '#4d9de0', full: '#4fb286', error: '#e5a13a' }
const NEARLY = 0.85
const SOFT = { color: 'var(--descrip-text, #999)', fontSize: '11px' }
const ROW = { display: 'flex', justifyContent: 'space-between', gap: '8px' }

const all = new Set()
setInterval(() => {
  try {
    if (!document.hidden) all.forEach(panel => panel.look())
  } catch {
    // a graph that is being built or taken apart: look again in a moment
  }
}, LOOK_MS)

const gigabytes = bytes => `${(bytes / 1e9).toFixed(bytes < 1e9 ? 2 : 1)} GB`

function planOf({ layers_stay: kept, layers: count, slice_tokens: tokens, tile_px: side }) {
  const told = [
    kept !== null && say('layers', { kept, count }),
    tokens !== null && say('at_once', { count: tokens }),
    side !== null && say('tiles', { side }),
  ]
  return told.filter(Boolean).join(', ') || say('whole')
}

export class MemoryPanel {
  constructor(node) {
    this.node = node
    this.answer = null
    this.missing = []
    this.asked = this.seen = undefined
    this.content = element('div', { display: 'flex', flexDirection: 'column', gap: '5px', padding: '5px 7px' })
    this.root = element(
      'div',
      {
        overflow: 'hidden', borderRadius: '6px', background: 'var(--comfy-input-bg, #222)',
        color: 'var(--input-text, #ddd)', font: '12px/1.35 Inter, Arial, sans-serif', userSelect: 'none',
      },
      this.content
    )
    this.root.className = 'wan-s2v-memory'
    addWidget(node, 'wan_s2v_memory', this.root, { getMinHeight: () => Math.max(HEIGHT, this.content.offsetHeight + 2 * MARGIN) })
    all.add(this)
    this.write()
  }

  remove() {
    all.delete(this)
  }

  /** Ask the server when the settings are others than a moment ago, and stay so for a moment. */
  look() {
    const question = memoryQuestionOf(this.node)
    const key = question && `${question.query} ${question.missing}`
    const isSettled = key === this.seen
    this.seen = key
    if (!isSettled || key === this.asked) return
    this.asked = key
    this.missing = question?.missing ?? []
    if (question) this.ask(question.query, key)
    else this.write((this.answer = null))
  }

  /** A run has ended: other networks may lie on the card than before. */
  renew() {
    this.asked = undefined
  }

  async ask(query, key) {
    let answer
    if (!this.answer) this.write(say('planning'))
    try {
      const response = await api.fetchApi(`/wan_s2v/memory?${query}`)
      answer = await response.json()
    } catch {
      answer = { error: say('no_server') }
    }
    if (key !== this.asked) return
    this.answer = answer
    this.write()
  }

  write(note = '') {
    this.content.replaceChildren(...this.parts(note))
    growToFit(this.node)
  }

  parts(note) {
    const { answer, missing } = this
    if (!answer?.stages) {
      const style = answer?.error ? { color: COLOURS.error } : SOFT
      return [element('div', style, note || answer?.error || say('no_model'))]
    }
    const { device, stages } = answer
    const parts = [device ? headOf(device) : element('div', {}, say('without_card')), ...stages.map(rowOf)]
    if (missing.length) parts.push(element('div', SOFT, say('assumed', { names: missing.join(', ') })))
    return parts
  }
}

function headOf({ name, usable_bytes: usable, total_bytes: total }) {
  const title = element('b', { overflow: 'hidden', whiteSpace: 'nowrap', textOverflow: 'ellipsis' }, name)
  title.title = name
  return element('div', ROW, title, element('span', { flex: 'none' }, say('usable', { usable: gigabytes(usable), total: gigabytes(total) })))
}

/** Name, plan and bytes of a stage, above how much of its room it takes. */
function rowOf(forecast) {
  const { stage, peak_bytes: peak, room_bytes: room, error } = forecast
  const share = error ? 1 : room ? Math.min(1, peak / room) : 0
  const colour = error ? COLOURS.error : share > NEARLY ? COLOURS.full : COLOURS.fits
  const plan = error ?? (room === null ? say('in_memory') : planOf(forecast))
  const name = element('span', { flex: 'none' }, say(`stage_${stage.toLowerCase().replace(' ', '_')}`))
  const words = element('span', { ...SOFT, flex: '1', ...(error && { color: COLOURS.error }) }, plan)
  const row = element('div', {}, element('div', { ...ROW, alignItems: 'baseline' }, name, words, peak === null ? '' : gigabytes(peak)))
  if (room !== null) {
    const filled = element('div', { width: `${100 * share}%`, height: '100%', background: colour })
    row.append(element('div', { height: '4px', borderRadius: '2px', overflow: 'hidden', background: 'rgba(128, 128, 128, 0.3)' }, filled))
  }
  row.className = 'wan-s2v-stage'
  return row
}
