"""How a page looks, measured: what sticks out of the window, what is covered, what is too faint to read."""

from __future__ import annotations

import re
from typing import Any

ELEMENTS = """
    const isShown = (e) => e.checkVisibility({ visibilityProperty: true })
        && !e.closest(".unseen, .skip, noscript");
    const ownText = (e) => [...e.childNodes]
        .filter((node) => node.nodeType === Node.TEXT_NODE && node.data.trim() !== "");
    const isControl = (e) => e.matches("button, input, select, textarea, summary");
    const nameOf = (e) => `${e.tagName.toLowerCase()}#${e.id}.${e.className} `
        + JSON.stringify(e.textContent.trim().slice(0, 60));
    const seen = (root) => [...document.querySelectorAll(root + " *")].filter(isShown);
"""
WIDE = """() => {
    const isInside = (e) => { // a box that scrolls in itself, or that hides what is too long for it
        for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
            if (getComputedStyle(p).overflowX !== "visible") return true;
        return false;
    };
    const wide = seen("body").filter((e) => {
        const box = e.getBoundingClientRect();
        return box.width > 0 && (box.left < -1 || box.right > innerWidth + 1) && !isInside(e);
    });
    if (document.documentElement.scrollWidth > innerWidth) wide.push(document.documentElement);
    return wide.map(nameOf);
}"""
COVERED = """(root) => {
    const isHit = (e, block) => {
        e.scrollIntoView({ block, inline: "nearest" });
        const own = e.getBoundingClientRect();
        let box = own;
        if (!isControl(e)) {
            const range = document.createRange();
            range.selectNodeContents(ownText(e)[0]);
            box = [...range.getClientRects()].find((r) => r.width > 0 && r.height > 0);
            if (!box) return true;
        }
        // A text that is cut short ends with its element.
        const middle = (from, to) => (Math.max(box[from], own[from]) + Math.min(box[to], own[to])) / 2;
        const hit = document.elementFromPoint(middle("left", "right"), middle("top", "bottom"));
        // A control and its label are one.
        return hit && (e.contains(hit) || (e.closest("label")?.contains(hit) ?? false));
    };
    const scrolls = (box) => /auto|scroll/.test(getComputedStyle(box).overflowY)
        && box.scrollHeight > box.clientHeight;
    const isTall = (e) => { // for the box that it scrolls in: its beginning is then not in view
        let box = e.parentElement;
        while (box !== document.documentElement && !scrolls(box)) box = box.parentElement;
        return e.getBoundingClientRect().height > box.clientHeight / 2;
    };
    return seen(root).filter((e) => isControl(e) || ownText(e).length)
        .filter((e) => !isHit(e, "nearest") && !(isTall(e) && isHit(e, "start"))).map(nameOf);
}"""
COLOURS = """() => seen("body").filter((e) => ownText(e).length && !e.matches(":disabled")).map((e) => {
    const layers = [];
    for (let p = e; p; p = p.parentElement) layers.push(getComputedStyle(p).backgroundColor);
    const paper = layers.find((colour) => !/, 0\\)$/.test(colour) && colour !== "transparent");
    return [nameOf(e), getComputedStyle(e).color, paper];
})"""


def _evaluate(page: Any, script: str, *arguments: Any) -> list[Any]:
    result: list[Any] = page.evaluate(
        f"(argument) => {{ {ELEMENTS} return ({script})(argument); }}", *arguments
    )
    return result


def sticking_out(page: Any) -> list[str]:
    """Return what reaches beyond the window's sides; the page itself if it can be scrolled sideways."""
    return _evaluate(page, WIDE)


def covered(page: Any, root: str = "body") -> list[str]:
    """Return the texts and controls below an element that stay covered when they are scrolled into view."""
    return _evaluate(page, COVERED, root)


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour, written as rgb(r, g, b)."""
    values = [float(v) / 255 for v in re.findall(r"[\d.]+", colour)[:3]]
    r, g, b = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of WCAG 2 between two colours, written as rgb(r, g, b)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def too_faint(page: Any) -> list[str]:
    """Return the texts whose contrast with what is behind them is below 4.5, the limit of WCAG 2.

    Disabled controls are exempt.
    """
    return [
        f"{name}: {ink} on {paper}"
        for name, ink, paper in _evaluate(page, COLOURS)
        if contrast(ink, paper) < 4.5
    ]
