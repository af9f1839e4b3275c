"""stub."""


def origins_page(a, b):
    return ""
