// The timeline of a conditioning node: voice, clips and seconds, as the server plans them, and how far a run is.
import { api } from '../../../scripts/api.js'
import { app } from '../../../scripts/app.js'
import { addWidget, element } from './elements.js'
import { questionOf } from './graph.js'
import { say } from './texts.js'

const LOOK_MS = 400
const HEIGHT = 142
const TOP = 18
const BOTTOM = 16
const QUIETEST = 0.02
const COLOURS = { finished: '#4fb286', working: '#4d9de0', waiting: '#8b93a1', error: '#e5a13a' }
const TICKS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800]
const CAPTION = { display: 'flex', flexWrap: 'wrap', gap: '0 8px', justifyContent: 'space-between', flex: 'none' }

const all = new Set()
setInterval(() => {
  try {
    if (!document.hidden) all.forEach(timeline => timeline.look())
  } catch {
    // a graph that is being built or taken apart: look again in a moment
  }
}, LOOK_MS)

const digits = seconds => seconds.toFixed(seconds < 100 ? 1 : 0)

export class Timeline {
  constructor(node) {
    this.node = node
    this.plan = null
    this.error = ''
    this.asked = this.seen = undefined
    this.isMade = false
    this.progress = {}
    this.title = element('div', CAPTION)
    this.state = element('div', { ...CAPTION, color: 'var(--descrip-text, #999)', fontSize: '11px' })
    this.canvas = element('canvas', { position: 'absolute', inset: '0', width: '100%', height: '100%' })
    this.picture = element('div', { position: 'relative', flex: '1', minHeight: '70px', overflow: 'hidden' }, this.canvas)
    this.root = element(
      'div',
      {
        display: 'flex', flexDirection: 'column', gap: '2px', padding: '5px 7px', boxSizing: 'border-box',
        overflow: 'hidden', borderRadius: '6px', background: 'var(--comfy-input-bg, #222)',
        color: 'var(--input-text, #ddd)', font: '12px/1.35 Inter, Arial, sans-serif', userSelect: 'none',
      },
      this.title, this.picture, this.state
    )
    this.root.className = 'wan-s2v-timeline'
    this.root.addEventListener('mousemove', event => this.explain(event))
    this.observer = new ResizeObserver(() => this.draw())
    this.observer.observe(this.picture)
    addWidget(node, 'wan_s2v_timeline', this.root, { getMinHeight: () => HEIGHT })
    all.add(this)
    this.write()
  }

  remove() {
    all.delete(this)
    this.observer.disconnect()
  }

  /** Ask the server when the settings are others than a moment ago, and stay so for a moment. */
  look() {
    const question = questionOf(this.node)
    const isSettled = question === this.seen
    this.seen = question
    if (!isSettled) return
    if (question === this.asked) {
      if (this.drawnAt !== this.ratio()) this.draw()
      return
    }
    this.asked = question
    this.isMade = false
    this.progress = {}
    if (question === null) {
      this.plan = null
      this.write()
    } else this.ask(question)
  }

  async ask(question) {
    let answer
    if (!this.plan) this.write(say('reading'))
    try {
      const response = await api.fetchApi(`/wan_s2v/timeline?${question}`)
      answer = await response.json()
    } catch {
      answer = { error: say('no_server') }
    }
    if (question !== this.asked || this.isMade) return
    this.plan = answer.clips ? answer : null
    this.error = answer.error ?? ''
    this.write()
  }

  /** What a run has planned, whatever the graph says meanwhile. */
  show(plan) {
    this.asked = this.seen = questionOf(this.node)
    this.plan = plan
    this.error = ''
    this.isMade = true
    this.progress = {}
    this.write()
  }

  /** How far the sampler is: {clip, step, steps} while one is made, {finished} between. */
  follow(progress) {
    this.progress = progress.step ? { ...progress, finished: progress.clip } : { finished: progress.finished, clips: progress.clips }
    this.write()
  }

  /** The run has ended: no clip is at work. */
  rest() {
    if (this.progress.step === undefined) return
    this.progress = { finished: this.progress.finished, clips: this.progress.clips }
    this.write()
  }

  write(note = '') {
    const { plan, progress } = this
    this.picture.style.display = plan ? '' : 'none'
    if (!plan) {
      this.title.textContent = note || this.error || say('unknown')
      this.title.style.color = this.error && !note ? COLOURS.error : 'var(--descrip-text, #999)'
      this.state.textContent = ''
      return
    }
    const count = plan.clips.length
    const cut = plan.sound_seconds - plan.seconds > 0.5 // some of the voice is left out
    const seconds = cut ? say('of_sound', { shown: digits(plan.seconds), count: digits(plan.sound_seconds) }) : say('seconds', { count: digits(plan.seconds) })
    const bold = element('b', {}, count === 1 ? say('clip_one') : say('clips', { count }))
    this.title.style.color = ''
    this.title.replaceChildren(bold, element('span', {}, say('frames', { count: plan.frames })), element('span', {}, seconds))
    let state = say(this.isMade ? 'made' : 'planned')
    if (progress.step) state = say('working', { clip: progress.clip + 1, clips: progress.clips, step: progress.step, steps: progress.steps })
    else if (progress.finished !== undefined) state = say('finished', progress)
    this.state.textContent = state
    this.draw()
  }

  /** Pixels of the drawing for one of the page's: sharp on fine screens and when zoomed in. */
  ratio() {
    return (window.devicePixelRatio || 1) * Math.min(3, Math.max(1, app.canvas?.ds?.scale ?? 1))
  }

  /** Where clips lie: {first, last} in seconds, and how they stand. */
  stretches() {
    const { plan, progress } = this
    const isThisPlan = progress.clips === plan.clips.length // a run of other settings says nothing about this one
    return plan.clips.map((clip, index) => {
      const finished = isThisPlan && index < progress.finished
      const working = isThisPlan && progress.step && index === progress.clip
      const last = (clip.start_frame + clip.frames) / plan.fps
      const share = finished ? 1 : working ? progress.step / progress.steps : 0
      return { first: clip.start_frame / plan.fps, last, share, colour: COLOURS[finished ? 'finished' : 'working'], isOpen: !finished && !working }
    })
  }

  draw() {
    const { plan, canvas, picture } = this
    const [width, height] = [picture.clientWidth, picture.clientHeight]
    if (!plan || width < 20 || height < TOP + BOTTOM) return
    const ratio = (this.drawnAt = this.ratio())
    canvas.width = Math.round(width * ratio)
    canvas.height = Math.round(height * ratio)
    const pen = canvas.getContext('2d')
    if (!pen) return
    pen.scale(ratio, ratio)
    const colours = getComputedStyle(this.root)
    const text = colours.color || '#ddd'
    const at = seconds => (seconds / plan.seconds) * width
    const stretches = this.stretches()
    this.drawClips(pen, stretches, at, height, text)
    this.drawVoice(pen, stretches, at, height)
    this.drawSeconds(pen, at, width, height, text)
  }

  drawClips(pen, stretches, at, height, text) {
    pen.font = '11px Inter, Arial, sans-serif'
    pen.textBaseline = 'middle'
    pen.textAlign = 'center'
    stretches.forEach(({ first, last, share, colour, isOpen }, index) => {
      const [left, right] = [at(first), at(last)]
      const gap = right - left > 6 ? 1 : 0
      pen.fillStyle = text
      pen.globalAlpha = index % 2 ? 0.05 : 0.1
      pen.fillRect(left, 0, right - left - gap, height - BOTTOM)
      if (!isOpen) {
        pen.fillStyle = colour
        pen.globalAlpha = 0.28
        pen.fillRect(left, 0, (right - left - gap) * share, height - BOTTOM)
        pen.globalAlpha = 1
        pen.fillRect(left, 0, (right - left - gap) * share, 2)
      }
      pen.globalAlpha = 1
      if (right - left > pen.measureText(`${index + 1}`).width + 4) {
        pen.fillStyle = isOpen ? text : colour
        pen.fillText(`${index + 1}`, (left + right) / 2, TOP / 2 + 2)
      }
    })
  }

  drawVoice(pen, stretches, at, height) {
    const { peaks, peaks_seconds } = this.plan
    const loudest = Math.max(QUIETEST, ...peaks)
    const [middle, reach] = [(TOP + height - BOTTOM) / 2, (height - BOTTOM - TOP) / 2 - 2]
    const step = at(peaks_seconds) / peaks.length
    let clip = 0
    peaks.forEach((peak, index) => {
      const time = ((index + 0.5) / peaks.length) * peaks_seconds
      while (clip < stretches.length - 1 && time >= stretches[clip].last) clip++
      const { first, last, share, colour } = stretches[clip]
      pen.fillStyle = share && time < first + (last - first) * share ? colour : COLOURS.waiting
      const half = Math.max(0.5, (peak / loudest) * reach)
      pen.fillRect(index * step, middle - half, Math.max(step * 0.9, 0.5), 2 * half)
    })
  }

  drawSeconds(pen, at, width, height, text) {
    const { seconds } = this.plan
    const tick = TICKS.find(tick => at(tick) >= 36) ?? 3600
    pen.fillStyle = text
    pen.font = '10px Inter, Arial, sans-serif'
    for (let count = 0; count * tick <= seconds; count++) {
      const place = at(count * tick)
      pen.globalAlpha = 0.5
      pen.fillRect(Math.min(place, width - 1), height - BOTTOM, 1, 3)
      pen.globalAlpha = 0.75
      const label = `${Number((count * tick).toFixed(1))}${count ? '' : ' s'}`
      const half = pen.measureText(label).width / 2
      pen.fillText(label, Math.min(Math.max(place, half), width - half), height - BOTTOM / 2 + 2)
    }
    pen.globalAlpha = 1
  }

  /** The clip under the mouse, as a tooltip. */
  explain(event) {
    const { plan } = this
    const box = this.picture.getBoundingClientRect()
    const frame = plan && ((event.clientX - box.left) / box.width) * plan.frames
    const index = plan?.clips.findIndex(clip => frame >= clip.start_frame && frame < clip.start_frame + clip.frames) ?? -1
    if (index < 0) return this.root.removeAttribute('title')
    const { start_frame: first, frames } = plan.clips[index]
    const last = first + frames
    this.root.title = say('clip', { clip: index + 1, first: first + 1, last, begin: digits(first / plan.fps), end: digits(last / plan.fps) })
  }
}
