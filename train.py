"""deepspeed train.py --deepspeed ds_configs/zero3.json [--recipe NAME|FILE] [key=value ...]; see --help."""

from d2v_ds.engine.launch import end_process
from d2v_ds.training.run import main

if __name__ == "__main__":
    end_process(main(prog="train.py"))
