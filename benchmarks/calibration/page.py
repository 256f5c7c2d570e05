def page(records):
    return "\n".join(map(str, records))
