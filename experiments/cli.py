"""What all scripts share: flags with configuration overrides, and bad input told in one line."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence

from absl import flags

from jaxlong.config import Experiment, load, override, to_data
from jaxlong.core.types import BadInput
from jaxlong.data import describe
from jaxlong.parallel.processes import leave
from jaxlong.train.loop import Diverged


def experiment_flags(values: flags.FlagValues, config: str | None = None) -> None:
    """Define --config and --mesh, as `pretrain` and its kin take them."""
    flags.DEFINE_string(
        "config", config, "Python file of an experiment; --config.path.to.field=value", flag_values=values
    )
    flags.DEFINE_string("mesh", None, "shorthand of --config.mesh: data=2,fsdp=2,seq=2", flag_values=values)


def process_flags(values: flags.FlagValues) -> None:
    """Define --init_timeout and --heartbeat, as scripts that train in many processes take them."""
    flags.DEFINE_integer("init_timeout", 300, "seconds to wait for the other processes", flag_values=values)
    flags.DEFINE_integer("heartbeat", 100, "seconds of silence after which a process is dead", flag_values=values)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Flags without the `--config.path=value` among them, and those as pairs."""
    plain, overrides, rest = [], [], list(argv)
    while rest:
        flag = rest.pop(0)
        name, given, value = flag.lstrip("-").partition("=")
        if not flag.startswith("-") or not name.startswith("config."):
            plain.append(flag)
            continue
        if not given:
            if not rest:
                raise BadInput(name, "", "has no value", f"--{name}=value")
            value = rest.pop(0)
        overrides.append((name.removeprefix("config."), value))
    return plain, overrides


def build(values: flags.FlagValues, overrides: Sequence[tuple[str, str]]) -> Experiment:
    """The experiment of --config with its overrides and --mesh applied."""
    if values.config is None:
        raise BadInput("config", "unset", "which experiment?", "--config=configs/tiny.py")
    return apply_overrides(load(values.config), values, overrides)


def apply_overrides(
    experiment: Experiment, values: flags.FlagValues | None, overrides: Sequence[tuple[str, str]]
) -> Experiment:
    """The experiment with its overrides applied, then --mesh where a script has that flag."""
    for path, text in overrides:
        experiment = override(experiment, path, text)
    if values is not None and values.mesh is not None:
        experiment = override(experiment, "mesh", values.mesh)
    return experiment


def required(values: flags.FlagValues, name: str, example: str) -> str:
    """The value of a flag that has no default. Raises BadInput if it is not given."""
    if values[name].value is None:
        raise BadInput(name, "unset", "is needed", example)
    return values[name].value


def show(experiment: Experiment) -> None:
    """Print every value of the experiment once, by its dotted path, and what the data are (process 0)."""
    import jax

    from jaxlong.run import count_params, flat

    if jax.process_index() == 0:
        lines = [f"{name} = {value}" for name, value in flat(to_data(experiment)).items()]
        lines.append(f"parameters: {count_params(experiment.model):,}    devices: {jax.device_count()}")
        lines += [f"data: {part}" for part in describe(experiment.data)["mixture"]]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()


def progress(title: str) -> Callable[[int, int], None]:
    """A function of (done, all) that shows how far an evaluation is: one line on a terminal, else one each 10 s."""
    started = told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if done < total and now - told < (0.2 if terminal else 10.0):
            return
        told = now
        left = (now - started) / done * (total - done)
        line = f"{title} {done}/{total}  {left:.0f} s left"
        sys.stderr.write(f"\r{line}\033[K" + ("\n" if done == total else "") if terminal else line + "\n")
        sys.stderr.flush()

    return tell


def run(
    main: Callable[[Sequence[tuple[str, str]]], None], values: flags.FlagValues, argv: Sequence[str] | None = None
) -> int:
    """Parse flags and call `main(overrides)`; what ends early says why in one line on stderr.

    Exit code: 0, also after SIGTERM; 1 if training diverged; 2 for bad input; 75 where another process of the job was
    killed or does not answer (`jaxlong.parallel.processes.LOST`; it is not returned: the process ends); 130 for Ctrl-C.
    """
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("absl", "jax", "orbax", "etils"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    argv = sys.argv if argv is None else argv
    try:
        plain, overrides = split_overrides(argv)
        left = values(plain)[1:]
        if left:
            raise BadInput("argument", " ".join(left), "is no flag", "--name=value; see --help")
        main(overrides)
    except BadInput as error:
        return _end(2, str(error))
    except flags.Error as error:
        return _end(2, f"flag: {' '.join(argv[1:])}: {' '.join(str(error).split())}; see --help")
    except Diverged as error:
        return _end(1, str(error))
    except KeyboardInterrupt:
        return _end(130, "")
    return 0


def _end(code: int, line: str) -> int:
    sys.stderr.write(line + "\n" if line else "")
    leave(code)
    return code
