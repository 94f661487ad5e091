"""The reference's command name: python generate.py --task s2v-14B --ckpt_dir ... --audio ... --image ..."""

import sys
from os import environ

from wan_s2v_core.command import run_command

if __name__ == "__main__":
    # torchrun starts it once for each GPU, and says so here
    sys.exit(run_command(["generate", *sys.argv[1:]], environ.get("RANK", "0"), environ.get("WORLD_SIZE", "1")))
