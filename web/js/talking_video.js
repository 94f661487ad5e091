// What Wan S2V Talking Video needs of the page beyond ComfyUI's own: an upload button for the voice, since ComfyUI's serves
// one input of a node, here the picture; and the video in place of the sampler's last preview and the other way round, which
// ComfyUI mixes up where both come from nodes inside of one.
import { app } from '../../../scripts/app.js'
import { api } from '../../../scripts/api.js'

const NODE = 'WanS2VTalkingVideo'

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

app.registerExtension({
  name: 'WanS2V.TalkingVideo',
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return
    const executed = node.onExecuted
    node.onExecuted = function (output) {
      executed?.apply(this, arguments)
      if (!output?.animated) return
      delete app.nodePreviewImages?.[place(this)]
      forget(this)
    }
    const previewed = ({ detail }) => {
      if (node.videoContainer && String(detail.displayNodeId) === String(node.id)) forget(node)
    }
    api.addEventListener('b_preview_with_metadata', previewed)
    const removed = node.onRemoved
    node.onRemoved = function () {
      api.removeEventListener('b_preview_with_metadata', previewed)
      removed?.apply(this, arguments)
    }
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
    button.label = app.ui.settings.getSettingValue('Comfy.Locale') === 'zh' ? '上传声音文件' : 'choose voice to upload'
    button.serialize = false // widgets of a saved graph are counted
  },
})
