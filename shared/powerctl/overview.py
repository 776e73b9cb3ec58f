"""All of `powerctl status`: the verdict, what is wrong, GPUs and pods. Pure."""

from shared import messages
from shared.powerctl import tables
from shared.powerctl.layout import WIDTH, Paint, plain, wrapped
from shared.powerctl.verdict import problems, verdict

# Told above the tables, or as asked for.
_TOLD = ("enforced", "failed", "invalid")


def status(reply: messages.StatusReply, paint: Paint = plain, width: int = WIDTH) -> list[str]:
    """Return the lines of `powerctl status`, the most important first."""
    wrong = problems(reply)
    lines = [paint(line, "fail" if wrong else "") for line in wrapped(verdict(reply), width)]
    lines.append("")
    if wrong:
        lines.append(paint("not as it should be:", "fail"))
        for problem in wrong:
            lines += wrapped(problem, width, "  ", "    ")
        lines.append("")
    lines += wrapped(tables.header(reply), width)
    lines += ["", *tables.gpu_table(reply, paint, width)]
    return [*lines, "", *tables.pod_table(reply, paint, width, _TOLD)]
