"""The reference's command name: python generate.py --task s2v-14B --ckpt_dir ... --audio ... --image ..."""

import sys

from wan_s2v_core.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
