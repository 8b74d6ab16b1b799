"""A callback: `--external_plugins examples/plugins/callback.py` ends a run once its loss is low enough."""

from swiftlite import Callback, register_callback

ENOUGH = 0.05


class Enough(Callback):
    def on_step(self, run, step, values):
        if values["loss"] < ENOUGH:
            run.stop.early = f"loss {values['loss']:.3f} is below {ENOUGH}"

    def on_evaluate(self, run, step, values):
        print(f"step {step}: evaluated to {values['eval_loss']:.3f}")

    def on_save(self, run, step, paths):
        print(f"step {step}: saved {paths[0].name}")


register_callback(Enough())
