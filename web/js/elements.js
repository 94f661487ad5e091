// What both widgets are made with.
import { app } from '../../../scripts/app.js'

/** Around a widget, in pixels; a canvas takes it from the widget's height. */
export const MARGIN = 8

export function element(tag, style = {}, ...children) {
  const made = document.createElement(tag)
  Object.assign(made.style, style)
  made.append(...children)
  return made
}

/** Wheel and middle button belong to the canvas behind a widget: zooming and panning go on over it. */
export function letThrough(root) {
  const pass = event => {
    const isMiddle = event.type === 'pointermove' ? event.buttons & 4 : event.button === 1
    if (event.type !== 'wheel' && !isMiddle) return
    event.preventDefault()
    event.stopPropagation()
    app.canvas?.canvas?.dispatchEvent(new event.constructor(event.type, event))
  }
  for (const type of ['wheel', 'pointerdown', 'pointermove', 'pointerup']) root.addEventListener(type, pass, { passive: false })
}

/** Add a widget that no workflow and no prompt knows. It is the last one, so the values of others keep their places. */
export function addWidget(node, name, root, options) {
  const widget = node.addDOMWidget(name, name, root, { serialize: false, hideOnZoom: false, margin: MARGIN, ...options })
  widget.serialize = false
  letThrough(root)
  return widget
}

/** Make a node as high as its widgets need, no smaller than it is. */
export function growToFit(node) {
  const [width, height] = node.size
  const needed = node.computeSize?.()[1] ?? height
  if (needed > height) node.setSize?.([width, needed])
  app.canvas?.setDirty?.(true, true)
}
