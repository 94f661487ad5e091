"""What ComfyUI offers, for the nodes: folders, networks in its memory manager, messages and outputs."""
