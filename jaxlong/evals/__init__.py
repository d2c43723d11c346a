"""Tasks, the evaluation of language models by them, and views of the results.

`jaxlong.evals.report` draws figures and is not imported here.
"""

from jaxlong.evals.base import Example, LanguageModel, Record, Table, Task, Tokenizer, evaluate
from jaxlong.evals.needle import KeyValue, Needle, Passkey, needle_grid
from jaxlong.evals.perplexity import Loss, loss_by_position, perplexity, truncated_perplexity
from jaxlong.evals.ruler import RULER, Niah, VariableTracking

TASKS = {
    "needle": Needle,
    "passkey": Passkey,
    "key_value": KeyValue,
    "niah": Niah,
    "variable_tracking": VariableTracking,
}

__all__ = [
    "RULER",
    "TASKS",
    "Example",
    "KeyValue",
    "LanguageModel",
    "Loss",
    "Needle",
    "Niah",
    "Passkey",
    "Record",
    "Table",
    "Task",
    "Tokenizer",
    "VariableTracking",
    "evaluate",
    "loss_by_position",
    "needle_grid",
    "perplexity",
    "truncated_perplexity",
]
