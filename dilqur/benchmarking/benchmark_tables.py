"""The Markdown of a benchmark's result: rates, the phases of a step, and what else was seen of each variant."""

from dilqur.kernels.choose import PLAIN

DASH = "–"
NOT_OF_A_SLICE = "MFU is not known of it, since no data sheet gives a slice's peak, nor are power and temperature; all else is measured."


def markdown(result):
    """All of it. result: as scripts/benchmark.py writes it to benchmark.json."""
    rows = result["variants"]
    first = next(iter(rows))
    parts = [headline(result), rates(rows, first, result["on_gpu"]), phases(rows)]
    if any(gpu.get("mig") for gpu in result["machine"]["gpus"]):
        parts.insert(1, f"A MIG slice: {NOT_OF_A_SLICE}")
    if any(row["parity"] or row["parity_note"] for row in rows.values()):
        parts.append(parities(rows, first))
    if any(row["settings"].get("kernels") == "auto" for row in rows.values()):
        parts.append(chosen(rows))
    if any(row["evidence"] for row in rows.values()):
        parts.append(kernels(rows))
    if left_out := [f"- {name}: {missing(row['left_out'])}" for name, row in rows.items() if row.get("left_out")]:
        parts.append("Left out:\n\n" + "\n".join(left_out))
    if problems := [f"- {name}: {row['problem']}" for name, row in rows.items() if row["problem"]]:
        parts.append("Did not run:\n\n" + "\n".join(problems))
    return "\n\n".join(parts) + "\n"


def headline(result):
    machine, steps = result["machine"], result["steps"]
    gpus = machine["gpus"]
    driver = f", driver {machine['driver']}"
    where = f"{gpus[0]['name']}{driver}" if gpus else f"{machine['cpu']}, {machine['cores']} cores"
    size = f", {result['parameters']:,} parameters" if result["parameters"] else ""
    inputs = ", random weights and tokens" if result["synthetic"] else ""
    commit = (result["git"] or {}).get("commit", "unknown")[:10] + "+" * bool((result["git"] or {}).get("dirty"))
    return (
        f"`{result['command']}`\n\n"
        f"{result['recipe']}{size}{inputs}; {result['num_processes']} "
        f"process{'es' * (result['num_processes'] > 1)} on {where}; torch {result['packages']['torch']}, transformers "
        f"{result['packages']['transformers']}, commit {commit}; {result['rounds']} rounds in turn, {steps['timed']} steps "
        f"timed after {steps['warm_up']}; medians (ranges)"
    )


def span(figures, name, form="{:,.0f}", scale=1.0):
    """ "median (min to max)" of a figure over rounds, one number where there is one round."""
    if not figures or name not in figures:
        return DASH
    median, low, high = (form.format(figures[name][key] * scale) for key in ("median", "min", "max"))
    return median if low == high else f"{median} ({low} to {high})"


def table(heads, rows):
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * 1}{'---:|' * (len(heads) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def missing(left_out):
    """ "round 2, round 3 (no time)" of [(what, why)]."""
    by_reason = {why: [what for what, reason in left_out if reason == why] for _, why in left_out}
    return "; ".join(f"{', '.join(whats)} ({why})" for why, whats in by_reason.items())


def rates(rows, first, on_gpu):
    def cells(name, row):
        figures, reference = row["figures"], rows[first]["figures"]
        ratio = DASH
        if figures and reference:
            ratio = f"{figures['tokens_per_second']['median'] / reference['tokens_per_second']['median']:.2f}"
        used = row["utilisation"] or {}
        kinds = ("half", "whole")
        shown = [
            DASH if k not in used else f"{used[k]['mfu']:.1%}" if used[k]["mfu"] else f"{used[k]['tflops']:.4f}"
            for k in kinds
        ]
        memory = span(figures, "peak_memory_gb" if on_gpu else "resident_gb", "{:.2f}")
        largest = DASH if row["largest_batch"] is None else f"{row['largest_batch']}"
        rate, valid = span(figures, "tokens_per_second"), span(figures, "valid_tokens_per_second")
        return [name, f"{row['batch']}", rate, valid, ratio, *shown, memory, largest]

    known = any(used["mfu"] for row in rows.values() for used in (row["utilisation"] or {}).values())
    unit = "MFU" if known else "TFLOP/s"
    memory = "peak memory, GiB" if on_gpu else "resident, GiB"
    heads = [
        "variant",
        "batch a device",
        "tokens/s, all",
        "bearing a loss",
        f"× {first}",
        unit,
        f"{unit}, PaLM's",
        memory,
        "largest batch",
    ]
    return table(heads, [cells(name, row) for name, row in rows.items()])


def phases(rows):
    names = ("step", "forward", "backward", "optimizer", "data_wait", "logging")
    heads = ["a step, ms", *(name.replace("_", " ") for name in names)]
    body = [[n, *(span(row["figures"], f"{x}_seconds", "{:,.1f}", 1e3) for x in names)] for n, row in rows.items()]
    return table(heads, body)


def parities(rows, first):
    body = []
    for name, row in rows.items():
        p = row["parity"]
        note = [row["parity_note"] or DASH, DASH, DASH]
        body.append(
            [name, *([f"{p['largest']:.2e}, step {p['at_step']}", f"{p['last']:.2e}", f"{p['steps']}"] if p else note)]
        )
    return table([f"losses against {first}, nats", "largest difference", "at the last step", "steps"], body)


def chosen(rows):
    """What `kernels: auto` came to on this machine."""
    body = [
        [name, *(str(row["kernels"][key]).lower() for key in PLAIN)]
        for name, row in rows.items()
        if row["kernels"] and row["settings"]["kernels"] == "auto"
    ]
    return table(["kernels: auto chose", *PLAIN], body)


def kernels(rows):
    lines = ["| variant | expected | ran | longest |", "|---|---|---|---|"]
    for name, row in rows.items():
        if not row["evidence"]:
            continue
        expected = row["evidence"]["expected"]
        said = ", ".join(f"`{pattern}`".replace("|", "\\|") for pattern in expected) or DASH
        ran = (
            "nothing expected"
            if not expected
            else "yes"
            if all(expected.values())
            else "NO: " + ", ".join(f"`{p}`".replace("|", "\\|") for p, names in expected.items() if not names)
        )
        top = ", ".join(f"{o['name'].split('(')[0][:60]} {o['share']:.0%}" for o in row["evidence"]["top"][:3])
        lines.append(f"| {name} | {said} | {ran} | {top.replace('|', ' ')} |")
    return "\n".join(lines)
