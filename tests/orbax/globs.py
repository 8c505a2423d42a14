"""Path strings and globs of the command line, written down a second time so that rules can be judged."""

import re

SPECIAL = '\\/*?'


def escape(element):
    return ''.join('\\' + c if c in SPECIAL else c for c in str(element))


def path_string(path):
    return '/'.join(escape(element) for element in path)


def split(glob):
    """Elements of a glob; escapes stay in place."""
    elements, current, i = [], '', 0
    while i < len(glob):
        if glob[i] == '\\':
            current += glob[i:i + 2]
            i += 2
            continue
        if glob[i] == '/':
            elements.append(current)
            current = ''
        else:
            current += glob[i]
        i += 1
    return elements + [current]


def matches(glob, path):
    path = [str(element) for element in path]
    return _matches([] if glob == '' else split(glob), path)


def _matches(elements, path):
    if not elements:
        return not path
    if elements[0] == '**':
        return any(_matches(elements[1:], path[i:]) for i in range(len(path) + 1))
    return bool(path) and _element(elements[0], path[0]) and _matches(elements[1:], path[1:])


def _element(pattern, text):
    out, i = '', 0
    while i < len(pattern):
        c = pattern[i]
        if c == '\\':
            i += 1
            out += re.escape(pattern[i])
        elif c == '*':
            out += '.*'
        elif c == '?':
            out += '.'
        else:
            out += re.escape(c)
        i += 1
    return re.fullmatch(out, text, re.DOTALL) is not None


def around(rng, path):
    """A random glob that matches `path`, from the literal to `**`."""
    path = [str(element) for element in path]
    if not path:
        return '**'
    elements = [escape(element) for element in path]
    kind = rng.integers(0, 7)
    if kind == 0:
        return '/'.join(elements)
    if kind == 1:
        return '**'
    if kind == 2:
        return '/'.join(['**', elements[-1]])
    if kind == 3:
        return '/'.join([*elements[:rng.integers(0, len(elements))], '**'])
    at = int(rng.integers(0, len(elements)))
    text = path[at]
    if kind == 4 or not text:
        elements[at] = '*'
    elif kind == 5:
        cut = int(rng.integers(0, len(text) + 1))
        elements[at] = escape(text[:cut]) + '*'
    else:
        cut = int(rng.integers(0, len(text)))
        elements[at] = escape(text[:cut]) + '?' + escape(text[cut + 1:])
    return '/'.join(elements)
