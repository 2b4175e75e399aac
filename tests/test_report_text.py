"""Figures and names of the report as text, and where names stand in a chart."""

from __future__ import annotations

import pytest

from compress.report import text
from compress.report.labels import Box, place
from compress.report.markdown import escape, fenced


def test_fence_outgrows_its_content():
    assert fenced("a ```` b", "sh") == "`````sh\na ```` b\n`````"
    assert escape("resnet_mobile _a_ `b|c`") == r"resnet_mobile \_a\_ \`b\|c\`"


def test_names_in_the_chart_do_not_cover_each_other():
    anchors = [(50.0, 50.0), (52.0, 50.0), (54.0, 49.0), (120.0, 50.0), (195.0, 50.0)]
    sizes = [(40.0, 11.0)] * len(anchors)
    boxes = []
    for (x, y), (width, height), offset in zip(
        anchors, sizes, place(anchors, sizes, [], Box(0, 0, 200, 200)), strict=True
    ):
        left = x + offset.dx - {"left": 0.0, "center": width / 2, "right": width}[offset.horizontal]
        boxes.append(Box(left, y + offset.dy - height / 2, left + width, y + offset.dy + height / 2))
    assert sum(a.shared(b) for i, a in enumerate(boxes) for b in boxes[:i]) == 0
    assert all(box.left >= 0 and box.right <= 200 for box in boxes)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.size(0), "0 bytes"),
        (text.size(999), "999 bytes"),
        (text.size(1000), "1.00 KB"),
        (text.size(180_224), "180 KB"),
        (text.size(999_499), "999 KB"),
        (text.size(999_500), "1.00 MB"),
        (text.size(3_452_000), "3.45 MB"),
        (text.size(5 * 10**15), "5,000 TB"),
        (text.count(855_770), "856 k"),
        (text.count(41_000_000), "41.0 M"),
        (text.milliseconds(0.1234), "0.123 ms"),
        (text.milliseconds(12.34), "12.3 ms"),
        (text.milliseconds(1234.4), "1234 ms"),
        (text.milliseconds(0.0), "0.00 ms"),
        (text.duration(3.14), "3.1 s"),
        (text.duration(59.7), "1 min 00 s"),
        (text.duration(3599.8), "1 h 00 min"),
        (text.times(5.13, "smaller", "larger", "same size"), "5.1× smaller"),
        (text.times(0.5, "smaller", "larger", "same size"), "2.0× larger"),
        (text.times(1.04, "smaller", "larger", "same size"), "1.04× smaller"),
        (text.times(1.001, "smaller", "larger", "same size"), "same size"),
        (text.times(1234.0, "smaller", "larger", "same size"), "1,234× smaller"),
        (text.times(None, "smaller", "larger", "same size"), "—"),
        (text.factor(0.5), "2.0×"),
        (text.factor(150.2), "150×"),
        (text.factor_span(5.71, 5.9), "5.71× to 5.90×"),
        (text.factor_span(23.04, 24.0), "23.0× to 24.0×"),
        (text.signed(-0.001), "0.00"),
        (text.signed(-8.333, 1), "−8.3"),
        (text.moment("2026-07-01T14:00:59+02:00"), "2026-07-01 12:00 UTC"),
        (text.moment("2026-07-01T12:00:00Z"), "2026-07-01 12:00 UTC"),
        (text.moment("<b>\nlong ago"), "<b> long ago"),
        (text.signed_span(-1.31, 0.42), "−1.31 to +0.42"),
        (text.signed_scaled(text.size, -2_340_000), "−2.34 MB"),
        (text.signed_scaled(text.size, 0), "0 bytes"),
        (text.share(0.0, 2.0), "0 %"),
        (text.share(0.13, 2.0), "6.5 %"),
        (text.share(1.0, 3.0), "33 %"),
        (text.share(1.0, 0.0), "—"),
        (text.rate(5120.4), "5,120"),
        (text.rate(31.25), "31.2"),
        (text.rate(None), "—"),
        (text.count(None), "—"),
        (text.profiled(0.008), "0.008 ms"),
        (text.profiled(0.00042), "< 0.001 ms"),
        (text.profiled(0.0), "0.00 ms"),
        (text.profiled(1.2345), "1.23 ms"),
        (text.rough(15.94), "16"),
        (text.rough(153.2), "150"),
        (text.rough(9.96), "10"),
        (text.rough(1.234), "1.2"),
        (text.rough(0.0432), "0.043"),
        (text.rough(12_345.0), "12,000"),
        (text.rough(0.0), "0.0"),
        (text.ratio(23.0298), "23.03"),
        (text.ratio(1.0), "1.00"),
        (text.ratio(0.012345), "0.0123"),
        (text.ratio_with_span(0.0101, 0.00991, 0.0103), "0.0101 [0.0099, 0.0103]"),
        (text.ratio_with_span(7.25, 7.11, 7.4), "7.25 [7.11, 7.40]"),
        (text.p_value(0.0004), "p < 0.001"),
        (text.p_value(0.0312), "p = 0.031"),
        (text.p_value(0.6875), "p = 0.69"),
        (text.short("a-long-name", 6), "a-lon…"),
        (text.change(0.28), "0.28 points gained"),
        (text.plain(" a\n b\x00"), "a b\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_figures_as_text(shown, expected):
    assert shown == expected
