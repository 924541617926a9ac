"""What can go wrong in a way that its reader can mend.

Invariant: only `cli.py` turns these into a message and an exit code; every other module raises them.
Anything else that is raised is a defect of ours and keeps its traceback.
"""

MAX_CHARACTERS, TAIL_CHARACTERS = 600, 150
"""Of a sentence; what is longer quotes a file at length, and is shown by its beginning and its end."""


class UserError(ValueError):
    """Input that cannot be used: one sentence with what is wrong, where, and what to do (exit code 2).

    As text it is one line, in which nothing steers a terminal, whatever a file or a path that it quotes holds.
    """

    exit_code = 2

    def __str__(self) -> str:
        sentence = super().__str__()
        if len(sentence) > MAX_CHARACTERS:
            sentence = f"{sentence[: MAX_CHARACTERS - TAIL_CHARACTERS]} ... {sentence[-TAIL_CHARACTERS:]}"
        if not sentence.isprintable():
            sentence = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in sentence)
        if len(sentence) > MAX_CHARACTERS + 5:
            sentence = f"{sentence[:MAX_CHARACTERS]} ..."
        return sentence


class ConfigError(UserError):
    """A setting, or a combination of settings, that cannot be used."""


class CorpusError(UserError):
    """A text, token file or tokenizer that cannot be used."""


class CheckpointError(UserError):
    """A run folder or checkpoint that cannot be used."""


class RunFailed(UserError):
    """The input was usable, but the run could not be carried to its end (exit code 1)."""

    exit_code = 1


class Interrupted(UserError):
    """The user or the system asked the run to stop; its state is saved (exit code 130)."""

    exit_code = 130
