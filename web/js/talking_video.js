// What Wan S2V Talking Video needs of the page beyond ComfyUI's own: an upload button for the voice, since ComfyUI's serves
// one input of a node, here the picture; no look in the input folder for the picture of the pack; and the video in place
// of the sampler's last preview and the other way round, which ComfyUI mixes up where both come from nodes inside of one.
import { app } from '../../../scripts/app.js'
import { api } from '../../../scripts/api.js'
import { say } from './texts.js'

const NODE = 'WanS2VTalkingVideo'
const EMBEDDED = 'embedded demo'

async function upload(file) {
  const form = new FormData()
  form.append('image', file) // ComfyUI takes any file under this name
  const answer = await api.fetchApi('/upload/image', { method: 'POST', body: form })
  if (answer.status !== 200) throw new Error(`${file.name} was not uploaded: ${answer.status} ${answer.statusText}`)
  const { name, subfolder } = await answer.json()
  return subfolder ? `${subfolder}/${name}` : name
}

function choose(node, name) {
  const voice = node.widgets.find(widget => widget.name === 'voice')
  if (!voice.options.values.includes(name)) voice.options.values.push(name)
  voice.value = name
  voice.callback?.(name)
  node.setDirtyCanvas(true, true)
}

const PREVIEWS = ['$$canvas-image-preview', 'video-preview']

// Forget what the node shows, so that the page looks again at what there is to show.
function forget(node) {
  for (const widget of node.widgets.filter(widget => PREVIEWS.includes(widget.name))) {
    widget.onRemove?.()
    node.widgets.splice(node.widgets.indexOf(widget), 1)
  }
  node.imgs = node.images = node.preview = node.videoContainer = undefined
  node.previewMediaType = 'image'
}

function place(node) {
  return node.graph?.isRootGraph === false ? `${node.graph.id}:${node.id}` : String(node.id)
}

// Let the page forget the outputs or previews of a node. Newer ones keep them in a store, and only a copy in app.
function drop(node, kind) {
  const stores = document.getElementById('vue-app')?.__vue_app__?.config.globalProperties.$pinia?.state.value
  for (const held of [app[kind], stores?.nodeOutput?.[kind]]) delete held?.[place(node)]
}

// ComfyUI shows the chosen picture as a file of the input folder, and an error where it is the one of the pack.
function forgetEmbedded(node) {
  const picture = node.widgets.find(widget => widget.name === 'picture')
  if (picture.value === EMBEDDED) drop(node, 'nodeOutputs')
}

app.registerExtension({
  name: 'WanS2V.TalkingVideo',
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return
    const executed = node.onExecuted
    node.onExecuted = function (output) {
      executed?.apply(this, arguments)
      if (!output?.animated) return
      drop(this, 'nodePreviewImages')
      forget(this)
    }
    const previewed = ({ detail }) => {
      if (String(detail.displayNodeId) !== String(node.id)) return
      if (node.videoContainer || app.nodeOutputs?.[place(node)]?.animated?.[0]) forget(node)
      drop(node, 'nodeOutputs')
    }
    api.addEventListener('b_preview_with_metadata', previewed)
    const removed = node.onRemoved
    node.onRemoved = function () {
      api.removeEventListener('b_preview_with_metadata', previewed)
      removed?.apply(this, arguments)
    }
    const picture = node.widgets.find(widget => widget.name === 'picture')
    const chosen = picture.callback
    picture.callback = function () {
      chosen?.apply(this, arguments)
      forgetEmbedded(node)
    }
    requestAnimationFrame(() => forgetEmbedded(node)) // ComfyUI shows it in the same frame, earlier
    const picker = document.createElement('input')
    picker.type = 'file'
    picker.accept = 'audio/*,video/*'
    picker.onchange = async () => {
      try {
        if (picker.files.length) choose(node, await upload(picker.files[0]))
      } catch (error) {
        app.extensionManager.toast.add({ severity: 'error', summary: 'Wan S2V', detail: String(error.message ?? error) })
      }
      picker.value = ''
    }
    const button = node.addWidget('button', 'upload_voice', '', () => picker.click(), { serialize: false })
    button.label = say('choose_voice')
    const pictureButton = node.widgets.find(widget => widget.type === 'button' && widget.name === 'upload')
    if (pictureButton) pictureButton.label = say('choose_picture')
    button.serialize = false // widgets of a saved graph are counted
  },
})
