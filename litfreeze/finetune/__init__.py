"""Fine-tuning: `litfreeze.finetune(...)` is a run; the scripts behind it are `litfreeze.finetune.full` and `.lora`.

One name is both, the function and the package. Python makes a package an attribute of the one it stands in as soon as
anything in it is imported; so this package is itself what is called, and the order of imports does not matter."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Union


class _Finetune(ModuleType):
    def __call__(
        self,
        checkpoint_dir: Union[Path, str, None] = None,
        *,
        method: Literal["full", "lora"] = "full",
        quiet: bool = False,
        **options: Any,
    ) -> Any:
        """Fine-tune a model, as `litfreeze finetune full` and `lora` do, and print what they print.

            litfreeze.finetune("SmolLM2-135M-Instruct", data="records.jsonl", trainable_layers="10,11", max_steps=50)

        Args:
            checkpoint_dir: What to begin from; by default the embedded demo model.
            method: "full" trains the weights themselves, "lora" an adapter.
            quiet: Print nothing but warnings.
            options: Those of the command line, which `litfreeze finetune full --help` lists, by the same names. What
                has a group's name before it there can stand in that group, `train={"max_steps": 50}` or
                `train=TrainArgs(max_steps=50)`, or alone, `max_steps=50`, where no other option ends so. `data` is a
                path or records: dicts, as they would stand in a file. `config` is a YAML file of options, or a
                dict; what is given beside it wins, of a dataclass what is not its default. The environment is not read.

        Returns:
            litfreeze.train.job.Result: `checkpoint_dir`, `outcome.before` and `.after`, `proof`.

        Raises:
            UsageError: The input was wrong, or a run is under way in this process; nothing has begun.
            RunError: The run failed.
            Interrupted: A signal ended it, as the notebook's stop button does; `resume=` goes on.
        """
        from litfreeze.finetune.call import finetune

        return finetune(checkpoint_dir, method, quiet, options)


sys.modules[__name__].__class__ = _Finetune
