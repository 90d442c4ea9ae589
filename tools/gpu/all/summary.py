"""The report: a page made of a journal alone, whole or broken off."""

import json
import sys
from collections import defaultdict
from pathlib import Path

from journal import read

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
import tables

MOST_FAILURES = 40
MOST_OPS = 12
# What became of a row of the check.
STATES = ["passed", "failed", "not_run"]


def write(out: Path) -> None:
    page = markdown(read(out / "all.jsonl"))
    partial = out / ".all.md.partial"
    partial.write_text(page)
    partial.replace(out / "all.md")


def markdown(entries: list[dict]) -> str:
    head = next((entry["head"] for entry in entries if "head" in entry), {})
    lines = defaultdict(list)
    for entry in entries:
        if "line" in entry:
            lines[entry["step"]].append(entry["line"])
    sections = [
        ("Machine", machine(lines["machine"])),
        ("Check", checks({step: lines[step] for step in ("kernels", "images", "check")})),
        ("Sanitizers", sanitizers(lines["sanitizers"])),
        ("Ops of the real networks", profile(lines["profile"])),
        ("Tiles, splits and stages", sweep(lines["sweep"])),
        ("In turn with PyTorch", bench(lines["pytorch"] + lines["bench"], took(entries, "pytorch") + took(entries, "bench"))),
        ("Counters", counters(lines["ncu"])),
    ]
    parts = [first(head, entries)] + [f"## {title}\n\n{text}" for title, text in sections if text]
    return "\n".join(parts)


def took(entries: list[dict], step: str) -> float:
    """Seconds of a step, as far as it came."""
    of = [entry["at"] for entry in entries if entry["step"] == step]
    return of[-1] - of[0] if of else 0.0


def first(head: dict, entries: list[dict]) -> str:
    """What was run, and what came of each step."""
    done = any("done" in entry for entry in entries)
    began = {entry["step"]: entry["at"] for entry in entries if "begin" in entry}
    ended = {entry["step"]: (entry["at"], entry["end"]) for entry in entries if "end" in entry}
    body = []
    for step, begin, end, what in head.get("timetable", []):
        at, outcome = ended.get(step, (None, "broken off" if step in began else "not reached"))
        took = f"{at - began[step]:.0f}" if at is not None and step in began else ""
        body.append([step, f"{end - begin:.0f}", took, outcome, what])
    state = "All steps of the timetable were gone through" if done else "**Broken off**: what was measured until then"
    return f"""# {head.get("device", "?")}, {head.get("date", "?")}: `run {head.get("part", "?")}`

rarebit {head.get("revision", "?")}, {head.get("dtype", "?")}; {entries[-1]["at"] if entries else 0:.0f} of {head.get("seconds", 0):.0f} s. {state}.

{tables.table(["step", "planned, s", "took, s", "outcome", "what"], body)}"""


def machine(lines: list) -> str:
    facts = [(key, value) for line in lines if isinstance(line, dict) for key, value in line.items()]
    show = lambda value: ", ".join(f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)  # noqa: E731
    return "".join(f"- {key}: {show(value)}\n" for key, value in facts)


def checks(steps: dict[str, list]) -> str:
    """Rows by step and section, incidents, and the first failures."""
    body, incidents, failed, missing = [], [], [], []
    for step, lines in steps.items():
        counts = defaultdict(lambda: [0, 0, 0])
        for line in lines:
            if "row" in line:
                row = line["row"]
                state = STATES.index(row["state"])
                counts[row["section"]][state] += 1
                if state == 1:
                    failed.append([step, row["section"], row["name"], row["dtype"], number(row["error"]), number(row["allowed"]), row["what"]])
            elif "incident" in line:
                incidents.append(line["incident"])
            elif line.get("end", {}).get("never_launched"):
                missing.append(f"{step}: kernels of the build that nothing launched: {', '.join(line['end']['never_launched'])}")
        body += [[step, section, *three] for section, three in counts.items()]
    if not body and not incidents:
        return ""
    text = tables.table(["step", "section", "passed", "failed", "not run, for their kernel"], body)
    blamed = lambda incident: (incident["kernel"] or "no kernel blamed") + (", not launched again" if incident["quarantined"] else "")  # noqa: E731
    text += "".join(f"\n- **{blamed(incident)}**: {incident['section']}, {incident['name']}: {cell(incident['what'])}" for incident in incidents)
    text += "".join(f"\n- {words}" for words in missing)
    if failed:
        shown = [[cell(x) for x in row] for row in failed[:MOST_FAILURES]]
        text += f"\n\n{len(failed)} rows failed:\n\n" + tables.table(["step", "section", "what", "type", "error", "allowed", ""], shown)
    return text + "\n"


def number(x) -> str:
    return "-" if x is None else f"{x:.3e}"


def cell(text) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def sanitizers(lines: list) -> str:
    return "".join(f"- {line['sanitizer']}: {line['verdict']} {' '.join(line['summary'])}\n" for line in lines)


def profile(lines: list) -> str:
    """For each program the whole, the sum of its parts, and the ops that take most."""
    model, programs = "", defaultdict(lambda: ([], [], []))
    for line in lines:
        model = line.get("profile", {}).get("model", model).rsplit("/", 1)[-1]
        if "what" in line:
            ops, whole, failed = programs[f"{model} {line['what']}"]
            (failed if "error" in line else ops if "op" in line else whole).append(line)
    text = ""
    for name, (ops, whole, failed) in programs.items():
        total = lambda op: op["ms"] * op["count"]  # noqa: E731
        ops.sort(key=total, reverse=True)
        said = f"{whole[0]['ms']:.3f} ms in {whole[0]['launches']} launches" if whole else "not measured"
        least = f", at least {whole[0]['least_ms']:.3f} ms by peak rates" if whole else ""
        text += f"**{name}**: whole {said}{least}; its parts alone {sum(map(total, ops)):.3f} ms, {len(ops)} kinds of ops measured.\n\n"
        body = [
            [cell(op["op"]), op["count"], f"{op['ms']:.4f}", f"{total(op):.3f}", f"{op['ms'] / op['least_ms']:.1f}", ", ".join(op["kernels"])] for op in ops[:MOST_OPS]
        ]
        text += tables.table(["op", "times", "ms of one", "ms of all", "of the least", "kernels"], body) + "\n"
        text += "".join(f"- failed: {cell(line.get('op', 'whole'))}: {cell(line['error'])}\n" for line in failed)
    return text


def sweep(lines: list) -> str:
    """For each shape the cut that was measured first, which is the engine's choice, and the best one."""
    cases = defaultdict(list)
    failed = [line for line in lines if "error" in line]
    for line in lines:
        if "ms" in line:
            cases[line["case"]].append(line)
    if not cases and not failed:
        return ""
    cut = lambda line: f"{line['tile']}{' Hopper' if line['hopper'] else ''}, {line['splits']} parts, {line['stages']} stages"  # noqa: E731
    body = []
    for case, measured in cases.items():
        chosen, best = measured[0], min(measured, key=lambda line: line["ms"])
        times = [f"{1e3 * chosen['ms']:.1f}", cut(best), f"{1e3 * best['ms']:.1f}", f"{chosen['ms'] / best['ms']:.2f}"]
        body.append([case, len(measured), cut(chosen), *times])
    text = f"{sum(map(len, cases.values()))} cuts of {len(cases)} shapes; `tools/kernels/fit` makes the engine's table of `all/sweep.jsonl`.\n\n"
    text += tables.table(["shape", "cuts", "chosen", "us", "best", "us", "chosen/best"], body)
    return text + "".join(f"- failed: {cell(line['case'])}, {cut(line)}: {cell(line['error'])}\n" for line in failed)


def bench(lines: list, seconds: float) -> str:
    heads = [line["head"] for line in lines if "head" in line]
    if not heads:
        return ""
    report = heads[-1] | {"seconds": seconds, "cases": [line["case"] for line in lines if "case" in line]}
    report["goals"] = tables.goals(report)
    # One page in another: its headings go a level down, its title goes.
    page = tables.markdown(report).split("\n", 1)[1]
    return page.replace("\n## ", "\n### ").strip() + "\n"


def counters(lines: list) -> str:
    rows = [row for line in lines for row in line.get("ncu", [])]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return tables.table(keys, [[cell(row.get(key, "")) for key in keys] for row in rows]) if rows else ""


