# temporary: until sweepreport is merged
def write_report(folder, rows, recipe, best_config_yaml, title):
    (folder / "trials.md").write_text(title)
    return [folder / "trials.md"]


def terminal_table(rows, command):
    return "\n".join(str(r) for r in rows)
