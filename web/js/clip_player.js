// Finished clips of a run, playing in the sampler while later ones are made: the newest first, then all in turn.
import { api } from '../../../scripts/api.js'
import { addWidget, element, growToFit } from './elements.js'
import { say } from './texts.js'

const BAR = 30
const TALLEST = 320
const ICONS = {
  previous: 'M4 3h2v10H4zM13 3v10L6.5 8z',
  next: 'M10 3h2v10h-2zM3 3v10l6.5-5z',
  repeat: 'M4 4h7V2l3.5 3L11 8V6H5v2H3V5a1 1 0 0 1 1-1zM12 12H5v2l-3.5-3L5 8v2h6V8h2v3a1 1 0 0 1-1 1z',
  sound: 'M2 6h3l4-3.5v11L5 10H2zM10.5 5.2a4 4 0 0 1 0 5.6l1 1a5.4 5.4 0 0 0 0-7.6z',
}

function button(name, press) {
  const icon = document.createElementNS('http://www.w3.org/2000/svg', 'svg')
  const shape = document.createElementNS('http://www.w3.org/2000/svg', 'path')
  icon.setAttribute('viewBox', '0 0 16 16')
  icon.style.cssText = 'width:14px;height:14px;fill:currentColor;display:block'
  shape.setAttribute('d', ICONS[name])
  icon.append(shape)
  const made = element(
    'button',
    { padding: '4px', border: '0', borderRadius: '4px', background: 'none', color: 'inherit', cursor: 'pointer', opacity: '0.7' },
    icon
  )
  made.type = 'button'
  made.title = say(name)
  made.dataset.action = name
  made.addEventListener('click', press)
  return made
}

const light = (made, isOn) => {
  made.setAttribute('aria-pressed', isOn)
  Object.assign(made.style, { opacity: isOn ? '1' : '0.55', background: isOn ? 'rgba(77, 157, 224, 0.35)' : 'none' })
}

export class ClipPlayer {
  constructor(node) {
    this.node = node
    this.films = []
    this.clips = 0
    this.shown = -1
    this.repeats = false
    this.isOpen = false
    this.video = element('video', {
      width: '100%', flex: '1', minHeight: '0', objectFit: 'contain', background: '#000', borderRadius: '4px', display: 'block',
    })
    Object.assign(this.video, { muted: true, controls: true, playsInline: true, preload: 'auto', disablePictureInPicture: true })
    this.label = element('span', { flex: '1', whiteSpace: 'nowrap', overflow: 'hidden', textOverflow: 'ellipsis' })
    this.repeat = button('repeat', () => {
      this.repeats = !this.repeats
      this.write()
    })
    this.sound = button('sound', () => {
      this.video.muted = !this.video.muted
    })
    const bar = element(
      'div',
      { display: 'flex', alignItems: 'center', gap: '2px', flex: 'none' },
      this.label, button('previous', () => this.play(this.shown - 1)), button('next', () => this.play(this.shown + 1)), this.repeat, this.sound
    )
    this.root = element(
      'div',
      {
        display: 'flex', flexDirection: 'column', gap: '3px', height: '100%', boxSizing: 'border-box', overflow: 'hidden',
        color: 'var(--input-text, #ddd)', font: '12px/1.35 Inter, Arial, sans-serif', userSelect: 'none',
      },
      this.video, bar
    )
    this.root.className = 'wan-s2v-clips'
    this.frame = element('div', { display: 'none' }, this.root) // the page sets sizes on what it is given
    addWidget(node, 'wan_s2v_clips', this.frame, {
      getMinHeight: () => (this.isOpen ? this.height() : 0),
      getMaxHeight: () => (this.isOpen ? undefined : 0),
    })
    this.video.addEventListener('ended', () => this.play(this.repeats ? this.shown : this.shown + 1))
    this.video.addEventListener('volumechange', () => this.write())
    this.video.addEventListener('loadedmetadata', () => growToFit(this.node))
    this.video.addEventListener('error', () => this.drop())
  }

  /** What the sampler says: {clips, films} as a run begins, then also with what was there before, and after each clip. */
  follow({ clips, films, begins }) {
    if (!films) return
    if (begins) this.films = []
    if (begins && !films.length) this.stop()
    this.clips = clips
    for (const film of films) {
      const url = api.apiURL(`/view?${new URLSearchParams({ filename: film.filename, subfolder: film.subfolder, type: film.type, t: Date.now() })}`)
      this.films = [...this.films.filter(known => known.clip !== film.clip), { ...film, url }].sort((a, b) => a.clip - b.clip)
    }
    if (!films.length) return
    this.open()
    const newest = this.films.findIndex(film => film.clip === films.at(-1).clip)
    const isHeld = !begins && (this.repeats || (this.video.paused && !this.video.ended && this.video.currentTime > 0))
    if (isHeld) this.write()
    else this.play(newest)
  }

  /** The widget takes room from the first clip on; until then the node is no larger than it was. */
  open() {
    if (this.isOpen) return
    this.isOpen = true
    this.frame.style.display = ''
    growToFit(this.node)
  }

  height() {
    const { videoWidth, videoHeight } = this.video
    const width = (this.node.size?.[0] ?? 280) - 16
    return Math.min(TALLEST, videoWidth ? (width * videoHeight) / videoWidth : (width * 9) / 16) + BAR + 16
  }

  play(index) {
    if (!this.films.length) return
    this.shown = (index + this.films.length) % this.films.length
    const { url } = this.films[this.shown]
    if (this.video.getAttribute('src') !== url) this.video.src = url
    else this.video.currentTime = 0
    this.video.play().catch(() => {}) // a browser that wants a click first: the controls are there
    this.write()
  }

  remove() {
    this.stop()
  }

  stop() {
    this.shown = -1
    this.video.pause()
    this.video.removeAttribute('src')
    this.video.load()
    this.write()
  }

  /** A film that is no longer there, since the server has made room for newer runs. */
  drop() {
    if (!this.video.getAttribute('src')) return
    this.films.splice(this.shown, 1)
    if (this.films.length) this.play(Math.min(this.shown, this.films.length - 1))
    else this.stop()
  }

  write() {
    const film = this.films[this.shown]
    this.label.textContent = film ? say('playing', { clip: film.clip + 1, clips: this.clips }) : ''
    light(this.repeat, this.repeats)
    light(this.sound, !this.video.muted)
  }
}
