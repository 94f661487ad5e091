// What the widgets say, in the languages of locales/. {name} is replaced.
import { app } from '../../../scripts/app.js'

export const TEXTS = {
  en: {
    clips: '{count} clips',
    clip_one: '1 clip',
    frames: '{count} frames',
    seconds: '{count} s',
    of_sound: '{shown} of {count} s',
    clip: 'clip {clip}: frames {first} to {last}, {begin} to {end} s',
    working: 'clip {clip} of {clips}, step {step} of {steps}',
    finished: '{finished} of {clips} clips finished',
    planned: 'what a run will make',
    made: 'what the last run made',
    reading: 'reading the voice …',
    unknown: 'The plan is shown here when Load Audio gives the voice; otherwise once it runs.',
    no_server: 'The server does not answer.',
    usable: '{usable} of {total} usable',
    without_card: 'no card: everything in main memory',
    stage_voice: 'voice',
    stage_text: 'text',
    stage_vae_encode: 'VAE encode',
    stage_sampling: 'sampling',
    stage_vae_decode: 'VAE decode',
    in_memory: 'in main memory',
    layers: '{kept} of {count} layers stay',
    at_once: '{count} tokens at once',
    tiles: 'tiles of {side} px',
    whole: 'whole',
    planning: 'reading sizes of the models …',
    no_model: 'What each stage will take is shown here when a loader is connected.',
    assumed: 'not told by the graph, taken as usual: {names}',
    playing: 'clip {clip} of {clips}',
    previous: 'Clip before',
    next: 'Next clip',
    repeat: 'Repeat this clip',
    sound: 'Sound',
    choose_picture: 'choose picture to upload',
    choose_voice: 'choose voice to upload',
  },
  zh: {
    clips: '{count} 个片段',
    clip_one: '1 个片段',
    frames: '{count} 帧',
    seconds: '{count} 秒',
    of_sound: '{count} 秒中的 {shown} 秒',
    clip: '片段 {clip}：第 {first} 至 {last} 帧，{begin} 至 {end} 秒',
    working: '片段 {clip}/{clips}，第 {step}/{steps} 步',
    finished: '已完成 {finished}/{clips} 个片段',
    planned: '运行后将生成的内容',
    made: '上次运行生成的内容',
    reading: '正在读取语音……',
    unknown: '语音来自“加载音频”时，此处预先显示片段规划；否则在运行后显示。',
    no_server: '服务器没有应答。',
    usable: '可用 {usable}，共 {total}',
    without_card: '没有显卡：全部在内存中',
    stage_voice: '语音',
    stage_text: '文本',
    stage_vae_encode: 'VAE 编码',
    stage_sampling: '采样',
    stage_vae_decode: 'VAE 解码',
    in_memory: '在内存中',
    layers: '{count} 层中有 {kept} 层常驻',
    at_once: '每次 {count} 个 token',
    tiles: '{side} 像素的分块',
    whole: '完整',
    planning: '正在读取模型大小……',
    no_model: '连接加载器后，此处显示每个阶段将占用的显存。',
    assumed: '工作流中未指明，按默认值估计：{names}',
    playing: '片段 {clip}/{clips}',
    previous: '上一个片段',
    next: '下一个片段',
    repeat: '循环播放此片段',
    sound: '声音',
    choose_picture: '上传图片文件',
    choose_voice: '上传声音文件',
  },
}

function language() {
  try {
    const chosen = app.extensionManager?.setting?.get('Comfy.Locale') ?? app.ui?.settings?.getSettingValue('Comfy.Locale')
    return TEXTS[chosen] ? chosen : String(chosen ?? '').startsWith('zh') ? 'zh' : 'en'
  } catch {
    return 'en'
  }
}

export const say = (name, values = {}) => TEXTS[language()][name].replace(/\{(\w+)\}/g, (_, key) => values[key] ?? '')
