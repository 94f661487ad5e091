"""Nodes for tests alone, which look at values of ours as ComfyUI's caches and memory manager do, and at limits."""

import json
import sys

from comfy.model_patcher import ModelPatcher


class AnyType(str):
    def __ne__(self, other):
        return False


class Held:
    """What a value says it takes of host memory -> JSON, as text on the node."""

    RETURN_TYPES = ()
    FUNCTION = "look"
    CATEGORY = "tests"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (AnyType("*"),)}, "optional": {"after": (AnyType("*"),)}}

    def look(self, value, after=None):
        tensors = value._comfy_cache_tensors()
        told = {
            "ram": value.get_ram_usage(),
            "tensors": sum(tensor.nbytes for tensor in tensors),
            "devices": sorted({tensor.device.type for tensor in tensors}),
            "is_patcher": isinstance(getattr(value, "patcher", None), ModelPatcher),
        }
        return {"ui": {"text": [json.dumps(told)]}}


class PromptLimits:
    """The VRAM limit in GB that encoders find in the running prompt, as text on the node."""

    RETURN_TYPES = ()
    FUNCTION = "look"
    CATEGORY = "tests"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"number": ("INT", {"default": 0})}}

    def look(self, number):
        (limits,) = (module for name, module in sys.modules.items() if name.endswith("wan_s2v.nodes.limits"))
        return {"ui": {"text": [json.dumps(limits.limits_in_prompt().to_dict())]}}


NODE_CLASS_MAPPINGS = {"Held": Held, "PromptLimits": PromptLimits}
