"""Lengths of the prefix codes of residuals, in bits: a hex digit for each symbol.

A line is a context, the last that of all others. Made by benchmarks/residual_codes.py.
"""

RUN_LENGTHS = [
    "41235789aaaabbabbbbbbbbbbbbbbbb8",
    "1234569bb9bbbbbbbbbbbbbbbbbbbbbb",
    "1235568888aaaaaaaaaaaa9999999999",
    "1234668a8aaaaaaaaaaaaaaaaaaaaaaa",
    "1234668a8aaaaaaaaaaaaaaaaaaaaaaa",
    "1234569b9bbbbbbbbbbbbbbbbbbbbbbb",
    "123457799bbbbbbbbbbbbbbbbbbbbbba",
    "123457888bbabbbbbbbbbbbbbbbbbbbb",
    "123457799bbbbbbbbbbbbbbbbbbbbbba",
    "1234578899bbbabbbbbbbbbbbbbbbbba",
    "123457889aabbbbbbbbbbbbbbbbbbbb9",
    "1234667889aaabbbbbbbbbbbbbbbbbb9",
    "1334556667778888889999aaaabaaba6",
    "23344455566667777777888888888994",
    "34445555556666666666677776778782",
    "44445555555566666666766676677772",
    "34455555565666666666666677677772",
    "45555566666666766767777777777771",
    "44555566666676677777777777787871",
    "133345779aabbbbbbbbbbbbbbbbbbbb9",
]
VALUE_LENGTHS = [
    "1244757677777777",
    "1243769697999999",
    "124365a8b8b9bba9",
    "12438597a7aab9b8",
    "22335395b5b7b8b6",
    "22335395b5b7b8b6",
    "214385a7b7b8b8ba",
    "215384a6b8b8bbbb",
    "215384b6b7bbbbbb",
    "215374a6b9bbbbb9",
    "2242537bb6b8bbba",
    "22425386abb7bbbb",
    "2b315486bbb7bbbb",
    "3b2b41568bb7bbbb",
    "9919294953899798",
    "9919293848686888",
    "9919293949588888",
    "8888182838486887",
    "9999282828485838",
    "123457798b8b9b9b",
]
