"""Checkpoints in every layout that is read, and one clear message for each that is not."""

import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.config import UNUSED, S2VModelConfig
from wan_s2v_core.errors import CheckpointError
from wan_s2v_core.io.weights import open_weights
from wan_s2v_core.model import checkpoint as names
from wan_s2v_core.model.dit import S2VTransformer
from wan_s2v_core.model.loading import (
    DIT_STEM,
    OFFICIAL_FILES,
    TOKENIZER_FOLDER,
    Part,
    fill,
    find_part,
    load_audio_encoder,
    load_text_encoder,
    load_transformer,
    load_vae,
)
from wan_s2v_core.model.parts import Checkpoint
from wan_s2v_core.model.text_encoder import TextEncoder, clean_prompt
from wan_s2v_core.model.vae import VideoVAE
from wan_s2v_core.networks import load_placed
from wan_s2v_core.prepare import plan_loading

TEXT_FILE, VAE_FILE = OFFICIAL_FILES[names.TEXT_ENCODER][0], OFFICIAL_FILES[names.VAE][0]
SPEECH_FOLDER = OFFICIAL_FILES[names.SPEECH_ENCODER][0]


def table(golden, name):
    return json.loads((golden / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


@pytest.fixture
def dit_weights(tiny_checkpoint):
    """Official names -> bfloat16 tensors of the tiny DiT."""
    weights = {}
    for shard in sorted(tiny_checkpoint.glob(f"{DIT_STEM}*.safetensors")):
        weights |= load_file(shard)
    return weights


# --- names -------------------------------------------------------------------------------------------------------


def test_dit_maps_one_to_one_onto_the_14b_checkpoint(golden):
    manifest = table(golden, "manifest_s2v_14b")
    with torch.device("meta"):
        model = S2VTransformer(names.dit_config(manifest["config_json_saved_by_diffusers"]))
    ours = {names.dit_name(name): list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(ours) == 1260 and ours == manifest["keys"]


def test_vae_maps_one_to_one_onto_the_official_file(golden):
    facts = table(golden, "vae_key_map")
    with torch.device("meta"):
        network = VideoVAE().network
    shapes = {names.vae_name(name): list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes == facts["shapes"]
    assert {names.vae_name(theirs): theirs for theirs in network.state_dict()} == facts["mapping"]


def test_text_encoder_maps_one_to_one_onto_the_official_file(golden):
    facts = table(golden, "t5_key_map")
    with torch.device("meta"):
        network = TextEncoder({k: v for k, v in facts["config_full"].items() if k != "feed_forward_proj"}).network
    weights = {k: v for k, v in network.state_dict().items() if k not in names.TIED_TEXT_NAMES}
    assert {names.text_encoder_name(name): list(tensor.shape) for name, tensor in weights.items()} == facts["shapes"]
    assert {names.text_encoder_name(theirs): theirs for theirs in weights} == facts["mapping"]


def test_config_survives_the_official_spelling(tiny_maker):
    config = tiny_maker.DIT_CONFIG
    again = names.dit_config(names.official_dit_config(config))
    assert again.to_dict() | {"audio_layers": 4} == config.to_dict()


def test_single_file_of_the_14b_model_needs_no_config(golden):
    """Sizes are told from shapes, as in ComfyUI's files."""
    manifest = table(golden, "manifest_s2v_14b")
    keys = manifest["keys"]
    config = names.infer_dit_config(lambda ours: tuple(keys[names.dit_name(ours)]))
    assert config == names.dit_config(manifest["config_json_saved_by_diffusers"])


@pytest.mark.parametrize(
    ("layers", "blocks", "places"),
    [
        (S2VModelConfig.injected_blocks, 40, S2VModelConfig.injected_blocks),
        ((2, 0), 4, (0, 2)),
        ((1, 3), 12, (UNUSED, 3, UNUSED, 1)),  # blocks 1, 3, 10, 11 get one each; the last made for 1 serves it
        ((), 4, ()),
    ],
)
def test_injectors_serve_the_blocks_that_they_serve_in_the_reference(layers, blocks, places):
    assert names.injector_places(layers, blocks) == places


# --- the official layout -----------------------------------------------------------------------------------------


def test_official_folder_loads(folder, tiny_maker):
    model = load_transformer(folder, torch.float32)
    assert model.config == tiny_maker.DIT_CONFIG
    vae, text, speech = load_vae(folder), load_text_encoder(folder, torch.float32), load_audio_encoder(folder)
    assert vae.encode(torch.rand(1, 3, 5, 16, 16)).shape == (1, 16, 2, 2, 2)
    assert text.encode("A person talks.").shape[-1] == model.config.text_width
    assert speech.hidden_states(torch.randn(8000)).shape[0] == model.config.audio_layers


def test_tiny_checkpoint_depends_on_its_seed_alone(tiny_maker, tiny_checkpoint, tmp_path):
    again, other = tiny_maker.make_checkpoint(tmp_path / "again"), tiny_maker.make_checkpoint(tmp_path / "other", 1)
    for file in (f"{DIT_STEM}-00001-of-00002.safetensors", VAE_FILE, f"{TOKENIZER_FOLDER}/spiece.model"):
        assert (again / file).read_bytes() == (tiny_checkpoint / file).read_bytes()
    assert (other / VAE_FILE).read_bytes() != (again / VAE_FILE).read_bytes()


def test_weights_are_mapped_not_copied(tiny_checkpoint):
    """In its own precision a tensor stays in the file's memory map; loading holds nothing twice."""
    part = find_part(tiny_checkpoint, names.DIT)
    entry = part.found.entries["blocks.0.self_attn.q.weight"]
    model = part.build()
    fill(model, part, torch.bfloat16)
    assert model.stack.blocks[0].attention.q.weight.dtype == entry.dtype
    assert model.stack.blocks[0].attention.q.weight.data_ptr() == entry.read().data_ptr()


def test_loading_reads_one_tensor_at_a_time(tiny_checkpoint, monkeypatch):
    """At no moment are two source tensors alive: what was read is gone before the next is read."""
    import weakref

    from wan_s2v_core.model import loading

    alive: list[weakref.ref] = []
    original = loading.read_weight

    def watched(entries, name):
        assert not [ref for ref in alive if ref() is not None], f"a tensor was still held when {name} was read"
        value = original(entries, name).clone()
        alive.append(weakref.ref(value))
        return value

    monkeypatch.setattr(loading, "read_weight", watched)
    load_transformer(tiny_checkpoint, torch.float16)


def test_full_precision_parts_stay_float32(tiny_checkpoint):
    model = load_transformer(tiny_checkpoint, torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds["stack.blocks.0.attention.q.weight"] == torch.bfloat16
    assert kinds["stack.injectors.0.modulation.weight"] == torch.bfloat16
    for name in ("head.out.weight", "time_projection.weight", "stack.blocks.0.modulation", "audio_encoder.last.weight"):
        assert kinds[name] == torch.float32, name


# --- ComfyUI's files and other spellings -------------------------------------------------------------------------


def single_file(weights, path, config) -> Part:
    save_file(weights, path, metadata={"config": json.dumps(names.official_dit_config(config))})
    return find_part(path, names.DIT)


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module, atol=0.0):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_single_files_of_any_precision_and_prefix(prefix, dtype, dit_weights, tiny_maker, tiny_checkpoint, tmp_path):
    path = tmp_path / "any name at all.safetensors"
    single_file({prefix + k: v.to(dtype) for k, v in dit_weights.items()}, path, tiny_maker.DIT_CONFIG)
    expected = load_transformer(tiny_checkpoint, torch.float32)
    assert_same_weights(load_transformer(path, torch.float32), expected, atol=0 if dtype != torch.float16 else 1e-6)


@pytest.mark.parametrize("suffix", names.SCALE_SUFFIXES)
@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_float8_is_multiplied_out(suffix, per_row, dit_weights, tiny_maker, tiny_checkpoint, tmp_path):
    packed = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, value in dit_weights.items():
        if name.endswith("ffn.0.weight"):
            top = value.float().abs().amax(dim=1) if per_row else value.float().abs().max()
            scale = top / 448
            packed[name] = (value.float() / (scale[:, None] if per_row else scale)).to(torch.float8_e4m3fn)
            packed[name.removesuffix("weight") + suffix] = scale
            packed[name.removesuffix("weight") + "scale_input"] = torch.ones(())
        else:
            packed[name] = value
    part = single_file(packed, tmp_path / "fp8.safetensors", tiny_maker.DIT_CONFIG)
    report = part.compare(part.build())
    assert (report.missing, report.unexpected) == ([], []) and part.found.spelling == "ComfyUI"
    loaded = load_transformer(tmp_path / "fp8.safetensors", torch.float32).stack.blocks[1].feed_forward.up.weight
    exact = load_transformer(tiny_checkpoint, torch.float32).stack.blocks[1].feed_forward.up.weight
    assert (loaded - exact).abs().max() <= exact.abs().max() / 16  # half a step of three mantissa bits
    assert (loaded - exact).norm() / exact.norm() < 0.04


def test_text_encoder_with_its_tokenizer_inside(folder, tmp_path):
    """ComfyUI's umT5: transformers' names and the sentencepiece model as a tensor."""
    official = load_text_encoder(folder, torch.float32)
    weights = {k: v.clone() for k, v in official.network.state_dict().items() if k not in names.TIED_TEXT_NAMES}
    pieces = (folder / TOKENIZER_FOLDER / "spiece.model").read_bytes()
    weights[names.TOKENIZER_TENSOR] = torch.frombuffer(bytearray(pieces), dtype=torch.uint8)
    save_file(weights, tmp_path / "umt5.safetensors")
    comfy = load_text_encoder(tmp_path / "umt5.safetensors", torch.float32)
    prompt = "A woman sings，画面模糊 &amp; more"
    torch.testing.assert_close(comfy.encode(prompt), official.encode(prompt), atol=0, rtol=0)


def test_weights_lie_row_after_row(folder):
    """Views in another order have the same values, and matrix products round them differently."""
    file = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    weights = torch.load(file, weights_only=True)
    torch.save({name: value.mT.contiguous().mT if value.ndim > 1 else value for name, value in weights.items()}, file)
    encoder = load_text_encoder(folder, torch.bfloat16)
    assert all(value.is_contiguous() for value in encoder.parameters())


def test_vae_and_speech_in_other_spellings(folder, tmp_path):
    vae, speech = load_vae(folder), load_audio_encoder(folder)
    save_file(vae.network.state_dict(), tmp_path / "diffusers.safetensors")
    assert_same_weights(load_vae(tmp_path / "diffusers.safetensors"), vae)
    old = {names.rename(name, names.OLD_WEIGHT_NORM): v for name, v in speech.network.state_dict().items()}
    assert any(name.endswith("weight_g") for name in old)
    target = tmp_path / "speech"
    target.mkdir()
    shutil.copy(folder / SPEECH_FOLDER / "config.json", target)
    torch.save(old | {"lm_head.weight": torch.zeros(3, 32)}, target / "pytorch_model.bin")
    assert_same_weights(load_audio_encoder(target), speech)


def test_speech_file_without_config_is_told_from_shapes(tmp_path):
    from wan_s2v_core.model.audio_encoder import SpeechEncoder

    settings = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    settings |= {"conv_dim": [16] * 7, "conv_bias": True, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
    network = SpeechEncoder(settings)
    fill_random(network)
    save_file(network.network.state_dict(), tmp_path / "wav2vec2_english_fp16.safetensors")
    again = load_audio_encoder(tmp_path / "wav2vec2_english_fp16.safetensors")
    wave = torch.randn(4000)
    with torch.inference_mode():
        torch.testing.assert_close(again.hidden_states(wave), network.hidden_states(wave), atol=0, rtol=0)


def test_tokenizer_json_agrees_with_sentencepiece(folder):
    """The official folder's tokenizer.json and the sentencepiece model in ComfyUI's file give the same ids."""
    from wan_s2v_core.model.text_encoder import tokenizer_from_folder

    slow = tokenizer_from_folder(folder / TOKENIZER_FOLDER)
    write_tokenizer_json(folder / TOKENIZER_FOLDER)
    fast = tokenizer_from_folder(folder / TOKENIZER_FOLDER)
    for text in ("A person talks to the camera.", "画面模糊, 最差质量", "émigré ☃ 123", "x" * 600):
        assert fast(text) == slow(text)


def write_tokenizer_json(folder):
    """What transformers stores beside spiece.model."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = SentencePieceProcessor(model_proto=(folder / "spiece.model").read_bytes())
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.vocab_size())]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=pieces.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_long_prompts_are_cut_and_keep_their_end(tiny_checkpoint):
    encoder = load_text_encoder(tiny_checkpoint, torch.float32)
    ids = encoder.tokenize("talk " * 900)
    assert len(ids) == 512 and ids[-1] == 1 and ids[:100] == encoder.tokenize("talk " * 200)[:100]


def test_prompts_are_cleaned_as_in_the_reference(golden):
    for example in table(golden, "t5_key_map")["cleaning_examples"]:
        assert clean_prompt(example["raw"]) == example["cleaned"]


# --- bad files ---------------------------------------------------------------------------------------------------


class Attack:
    """A pickle that would write a file when loaded without weights_only."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def refused(load, *fragments) -> str:
    with pytest.raises(CheckpointError) as caught:
        load()
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, message
    assert "\n" not in message and message.endswith("."), "one line, with a way out"
    return message


def test_missing_shard(folder):
    (folder / f"{DIT_STEM}-00002-of-00002.safetensors").unlink()
    refused(lambda: load_transformer(folder), "1 of 2 shards are missing", "00002-of-00002", "Download")


def test_missing_shard_without_an_index(folder):
    (folder / f"{DIT_STEM}.safetensors.index.json").unlink()
    load_transformer(folder)
    (folder / f"{DIT_STEM}-00001-of-00002.safetensors").unlink()
    refused(lambda: load_transformer(folder), "1 of 2 shards are missing", "00001-of-00002")


@pytest.mark.parametrize("kept", [0, 7, 40, -1])
def test_truncated_shard(folder, kept):
    shard = folder / f"{DIT_STEM}-00001-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:kept] if kept >= 0 else content[:-1000])
    refused(lambda: load_transformer(folder), shard.name, "download it again")


@pytest.mark.parametrize("cut", [100, 0.5])
def test_truncated_pth(folder, cut):
    file = folder / VAE_FILE
    content = file.read_bytes()
    file.write_bytes(content[: cut if isinstance(cut, int) else int(len(content) * cut)])
    refused(lambda: load_vae(folder), VAE_FILE, "ownload")


def test_index_and_shards_of_different_downloads(folder):
    index = folder / f"{DIT_STEM}.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["blocks.99.modulation"] = f"{DIT_STEM}-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    refused(lambda: load_transformer(folder), "blocks.99.modulation", "different downloads")


def test_a_folder_is_found_from_inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert find_part(".", names.DIT).kind == names.DIT


def test_files_that_begin_alike_are_left_alone(folder):
    """transformers folders often hold the same weights twice, and LoRAs lie beside models."""
    speech = folder / SPEECH_FOLDER
    save_file({"other": torch.zeros(1)}, speech / "model.fp16.safetensors")
    save_file({"other": torch.zeros(1)}, folder / f"{DIT_STEM}_lora.safetensors")
    (folder / f"{DIT_STEM}.safetensors.index.json").unlink()
    assert find_part(folder, names.SPEECH_ENCODER).weights.layout == "safetensors"
    assert len(find_part(folder, names.DIT).weights.files) == 2


def test_index_that_leaves_its_folder(folder):
    index = folder / f"{DIT_STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    refused(lambda: load_transformer(folder), "outside its folder")
    index.write_text(json.dumps({"weight_map": {"a": 7}}))
    refused(lambda: load_transformer(folder), "outside its folder")


def test_one_shard_instead_of_its_folder(folder):
    refused(lambda: load_transformer(folder / f"{DIT_STEM}-00001-of-00002.safetensors"), "one of 2 shards", "folder")


def test_missing_file_and_empty_folder(tmp_path):
    refused(lambda: load_vae(tmp_path / "vae.safetensors"), "vae.safetensors is not there")
    refused(lambda: load_transformer(tmp_path), "holds no weights", DIT_STEM)


def test_pickle_that_runs_code(folder, tmp_path):
    target = tmp_path / "written by the attack"
    torch.save({"conv1.weight": Attack(target)}, folder / VAE_FILE)
    refused(lambda: load_vae(folder), "wants to run code", "safetensors")
    assert not target.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_old_pickle_that_runs_code(folder, tmp_path):
    target = tmp_path / "written by the attack"
    (folder / TEXT_FILE).write_bytes(pickle.dumps(Attack(target)))
    message = refused(lambda: load_text_encoder(folder), TEXT_FILE, "wants to run code")
    assert "weights_only" not in message and not target.exists()


@pytest.mark.parametrize("cut", [2, 20, 60, 150])
def test_truncated_old_pickle(tmp_path, cut):
    path = tmp_path / "old.pth"
    torch.save({"weight": torch.zeros(400)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:cut])
    assert "run code" not in refused(lambda: open_weights(path), "not a complete PyTorch file")


def test_pickle_without_names(tmp_path):
    torch.save({0: torch.zeros(3)}, tmp_path / "x.pth")
    refused(lambda: open_weights(tmp_path / "x.pth"), "not a plain set of named tensors")


@pytest.mark.parametrize("scale", [None, torch.ones(7)])
def test_float8_without_fitting_scales(scale, dit_weights, tiny_maker, tmp_path):
    name = "blocks.1.ffn.0.weight"
    packed = dit_weights | {name: dit_weights[name].to(torch.float8_e4m3fn)}
    packed["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    if scale is not None:
        packed[name.replace(".weight", ".scale_weight")] = scale
    message = "no scale" if scale is None else "7 scales for 256 rows"
    refused(lambda: single_file(packed, tmp_path / "x.safetensors", tiny_maker.DIT_CONFIG), name, message)


def test_lora_of_the_audio_encoder_is_a_lora(tmp_path):
    save_file(
        {"casual_audio_encoder.encoder.final_linear.lora_A.weight": torch.zeros(4, 8)}, tmp_path / "x.safetensors"
    )
    refused(lambda: load_transformer(tmp_path / "x.safetensors"), "is a LoRA")


def test_tensors_of_odd_rank(dit_weights, tmp_path):
    name = "casual_audio_encoder.encoder.conv1_local.conv.weight"
    save_file(dit_weights | {name: torch.zeros(4)}, tmp_path / "x.safetensors")
    refused(lambda: load_transformer(tmp_path / "x.safetensors"), "shapes of none")


@pytest.mark.parametrize("kind", OFFICIAL_FILES)
def test_missing_companion(folder, kind):
    missing = folder / OFFICIAL_FILES[kind][0]
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    refused(lambda: find_part(folder, kind), names.PART_LABELS[kind], missing.name, "Download")


def test_missing_tokenizer(folder):
    shutil.rmtree(folder / "google")
    refused(lambda: load_text_encoder(folder), "holds no tokenizer", TOKENIZER_FOLDER)


def test_damaged_tokenizer(folder):
    (folder / TOKENIZER_FOLDER / "spiece.model").write_bytes(b"not a model")
    refused(lambda: load_text_encoder(folder), "tokenizer", "damaged")


OTHERS = {
    "Wan text-to-video": {"head.modulation": (1, 2, 8), "blocks.0.self_attn.q.weight": (8, 8)},
    "Wan image-to-video": {"patch_embedding.weight": (8, 36, 1, 2, 2)},
    "Wan VACE": {"vace_blocks.0.before_proj.weight": (8, 8), "head.modulation": (1, 2, 8)},
    "Wan Animate": {"face_adapter.fuser_blocks.0.linear1_kv.weight": (8, 8)},
    "TI2V 5B": {"patch_embedding.weight": (8, 48, 1, 2, 2)},
    "LoRA": {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": (4, 8)},
    "Wan 2.2 VAE": {"decoder.upsamples.0.upsamples.0.residual.0.gamma": (8,)},
    "Stable Diffusion VAE": {"decoder.mid.block_1.conv1.weight": (8, 8)},
    "T5 text encoder, not umT5": {"encoder.block.1.layer.0.SelfAttention.q.weight": (8, 8)},
    "CLIP": {"text_model.embeddings.token_embedding.weight": (8, 8)},
    "Whisper": {"model.encoder.conv1.weight": (8, 8, 3)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (8, 8)},
    "unknown model family": {"some.weight": (8, 8)},
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_models_are_named(family, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in OTHERS[family].items()}, path)
    refused(lambda: load_transformer(path), family, "Usable here: S2V DiT")


def test_the_wrong_part_is_named(folder):
    refused(lambda: load_transformer(folder / VAE_FILE), "is a Wan 2.1 VAE, not a S2V DiT")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64])
def test_packed_weights_are_refused(dtype, dit_weights, tmp_path):
    """Whether the packing shows in the shapes (two 4-bit numbers in a byte) or not."""
    name, stored = "blocks.1.self_attn.q.weight", str(dtype).removeprefix("torch.")
    for packed in (dit_weights[name], dit_weights[name][:, ::2].contiguous()):
        path = tmp_path / "x.safetensors"
        save_file(dit_weights | {name: packed.to(dtype)}, path)
        refused(lambda path=path: load_transformer(path), f"{name} stored as {stored}", "S2V DiT", "bf16")


def test_missing_tensor_and_wrong_shape(dit_weights, tiny_maker, tmp_path):
    name = "blocks.1.self_attn.q.weight"
    lacking = {key: value for key, value in dit_weights.items() if key != name}
    single_file(lacking, tmp_path / "a.safetensors", tiny_maker.DIT_CONFIG)
    refused(lambda: load_transformer(tmp_path / "a.safetensors"), "lacks 1 of 234", name)
    single_file(dit_weights | {name: torch.zeros(4, 4)}, tmp_path / "b.safetensors", tiny_maker.DIT_CONFIG)
    refused(lambda: load_transformer(tmp_path / "b.safetensors"), "other shapes", name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t2v"}, "model_type='t2v'"),
        ({"enable_motioner": True}, "enable_motioner=True"),
        ({"num_heads": 7}, "heads=7"),
        ({"audio_inject_layers": [0, 99]}, "injected_blocks"),
    ],
)
def test_config_of_another_model(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    refused(lambda: load_transformer(folder), message)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", "6"),
        ("num_layers", None),
        ("dim", 96.0),
        ("dim", 4 * 10**15),
        ("eps", "1e-6"),
        ("audio_inject_layers", None),
        ("audio_inject_layers", [0.5, 2]),
        ("enable_adain", 1),
    ],
)
def test_settings_of_another_kind(folder, name, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    refused(lambda: find_part(folder, names.DIT), f"config.json sets {name}={value!r}")


@pytest.mark.parametrize(("name", "value"), [("hidden_size", "32"), ("conv_dim", 16), ("num_attention_heads", 5)])
def test_speech_settings_of_another_kind(folder, name, value):
    path = folder / SPEECH_FOLDER / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    refused(lambda: load_audio_encoder(folder), "wav2vec" if value == 5 else f"sets {name}={value!r}")


def test_config_that_is_missing_or_no_json(folder):
    (folder / "config.json").write_text("{,")
    refused(lambda: load_transformer(folder), "config.json cannot be read as JSON")
    (folder / "config.json").unlink()
    refused(lambda: load_transformer(folder), "config.json")


def test_config_inside_a_file_that_is_no_json(dit_weights, tmp_path):
    save_file(dit_weights, tmp_path / "x.safetensors", metadata={"config": "{,"})
    refused(lambda: load_transformer(tmp_path / "x.safetensors"), "the config in", "JSON")


def test_small_file_without_config(dit_weights, tmp_path):
    """Heads and injected blocks of a model that is not the 14B one cannot be told from shapes."""
    save_file(dit_weights, tmp_path / "x.safetensors")
    (tmp_path / "x.json").write_text('{"trigger words": "of some other tool"}')
    refused(lambda: load_transformer(tmp_path / "x.safetensors"), "6 blocks of width 96", "config.json")


@pytest.mark.parametrize(
    ("start", "what"),
    [(b"GGUF\x03\x00\x00\x00", "GGUF"), (b"<!DOCTYPE html>", "web page"), (b"version https://git-lfs", "Git LFS")],
)
def test_files_that_are_something_else(start, what, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(start + b" " * 100)
    refused(lambda: open_weights(path), what)


# --- inspect -----------------------------------------------------------------------------------------------------


def test_inspect_a_folder(tiny_checkpoint, run_cli):
    code, out, err = run_cli("inspect", tiny_checkpoint, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert set(report) == {"format", "part", "config", "dtypes", "bytes", "keys", "parts"}
    assert [part["part"] for part in report["parts"]] == ["dit", "vae", "text_encoder", "audio_encoder"]
    assert report["keys"] == {"matched": 234 + 194 + 22 + 85, "missing": [], "unexpected": []}
    assert report["config"]["width"] == 96 and report["dtypes"] == {"bfloat16": 535}
    assert report["bytes"] == sum(part["bytes"] for part in report["parts"]) > 3_000_000


def test_inspect_says_what_is_missing_and_unexpected(dit_weights, tiny_maker, tmp_path, run_cli):
    weights = {k: v for k, v in dit_weights.items() if k != "head.modulation"} | {"extra.weight": torch.zeros(2)}
    single_file(weights, tmp_path / "x.safetensors", tiny_maker.DIT_CONFIG)
    code, out, _ = run_cli("inspect", tmp_path / "x.safetensors", "--json")
    report = json.loads(out)
    assert code == 1
    assert report["keys"] == {"matched": 233, "missing": ["head.modulation"], "unexpected": ["extra.weight"]}
    assert "missing: 1, such as head.modulation" in run_cli("inspect", tmp_path / "x.safetensors")[1]


def test_inspect_names_what_a_folder_lacks(folder, run_cli):
    (folder / VAE_FILE).unlink()
    shutil.rmtree(folder / "google")
    code, out, _ = run_cli("inspect", folder, "--json")
    assert code == 1 and json.loads(out)["keys"]["missing"] == [VAE_FILE, TOKENIZER_FOLDER]
    assert run_cli("inspect", folder)[1].startswith(f"missing in this folder: {VAE_FILE}")


def test_inspect_what_cannot_be_read(tmp_path, run_cli):
    code, out, err = run_cli("inspect", tmp_path / "nothing", "--json")
    assert code == 2 and "nothing is not there" in json.loads(out)["error"] and "Traceback" not in err


def test_a_file_that_is_replaced_before_it_is_loaded_is_opened_anew(tmp_path, tiny_maker):
    """A checkpoint is opened long before some of it is loaded; where tensors lie may be another place by then."""
    folder = tmp_path / "dit"
    folder.mkdir()

    def write(**sizes) -> S2VTransformer:
        config = replace(tiny_maker.DIT_CONFIG, **sizes)
        model = S2VTransformer(config)
        fill_random(model, 5)
        weights = {names.dit_name(name): value.clone() for name, value in model.state_dict().items()}
        save_file(weights, tmp_path / "new", {"format": "pt"})
        (tmp_path / "new").replace(folder / f"{DIT_STEM}.safetensors")
        (folder / "config.json").write_text(json.dumps(names.official_dit_config(config)))
        return model

    write()
    checkpoint = Checkpoint({names.DIT: folder})
    stamps = checkpoint.stamps(names.DIT)
    second = write(feed_forward_width=2 * tiny_maker.DIT_CONFIG.feed_forward_width)
    placed = load_placed(checkpoint, names.DIT, plan_loading("float32", "cpu"), False)
    assert checkpoint.stamps(names.DIT) != stamps and checkpoint.config(names.DIT) == second.config
    for name, value in placed.network.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
