"""deepspeed train.py --deepspeed ds_configs/zero3.json [--recipe NAME|FILE] [key=value ...]; see --help."""

from d2v_ds.training.signals import listen

if __name__ == "__main__":
    listen()  # before the imports below, which take seconds
    from d2v_ds.engine.launch import end_process
    from d2v_ds.training.run import main

    end_process(main(prog="train.py"))
