"""deepspeed train.py --deepspeed ds_configs/zero3.json [--recipe NAME|FILE] [key=value ...]; see --help."""

import sys

from d2v_ds.training.run import main

if __name__ == "__main__":
    sys.exit(main(prog="train.py"))
