"""Train, look, convert and ask from Python: `python examples/python_api.py MODEL OUTPUT`, or cell by cell in a notebook.

MODEL: a Hugging Face directory; without one at hand: `python examples/make_tiny_model.py MODEL`.
"""

# %% what is there
import sys
from pathlib import Path

import swiftlite
from swiftlite.api import Checkpoint, convert, train

model, output = sys.argv[1], Path(sys.argv[2])
checkpoint = Checkpoint.open(model)
print(checkpoint.config["architectures"][0], len(checkpoint.names), "tensors")

# %% train: rows or files; a setting is a flag of `swiftlite sft`
rows = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "I am Swifty."}]}
    for question in ("Who are you?", "What is your name?", "Who am I talking to?", "Say your name.")
]
if __name__ == "__main__":  # in a script: saving a Megatron checkpoint starts helper processes
    run = train("sft", model, rows, output / "run", train_type="lora", lr=1e-3, train_iters=20, global_batch_size=4,
                logging_steps=1, save_steps=20)  # fmt: skip

    # %% look
    print("loss", run.history[0]["loss"], "->", run.history[-1]["loss"])
    print("curves", run.plot())

    # %% convert: the adapter, merged into a Megatron-core checkpoint
    mcore = convert(model, output / "mcore", to="mcore", adapters=[run.checkpoint], merge_lora=True)
    print(Checkpoint.open(mcore).kind, mcore)

    # %% ask
    swiftlite.infer_main(
        ["--model", model, "--adapters", str(run.checkpoint), "--prompt", "Who are you?", "--max_new_tokens", "8"]
    )
