"""What the machine code of a kernel does for each logit, read from a disassembly.

Counted is the part that logits pass: the body of the loop that loads them; in a kernel without such a loop, the
shortest way through the program that takes an exponential, so neither the rows nor the columns that are exceptions.
"""

import heapq
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Instruction(NamedTuple):
    text: str
    target: int | None = None  # of a jump, an index
    falls: bool = True  # whether the next one may follow


@dataclass(frozen=True)
class Syntax:
    parse: Callable[[str], list[Instruction]]
    load: str  # from global memory, with its width; a pattern as the others
    widths: dict[str, int]  # bytes by what `load` found
    exponential: str
    tensor_core: str
    exchange: str  # between threads, or waiting for them
    flops: dict[str, int]  # pattern -> of an instruction

    def width(self, instruction: Instruction) -> int:
        """Bytes that it loads from global memory, 0 where it is something else."""
        found = re.match(self.load, instruction.text)
        return self.widths[found.group(1) or ""] if found else 0

    def count(self, pattern: str, code: list[Instruction]) -> int:
        return sum(bool(re.match(pattern, i.text)) for i in code)

    def main_part(self, code: list[Instruction]) -> list[Instruction]:
        loops = (code[i.target : k + 1] for k, i in enumerate(code) if i.target is not None and i.target <= k)
        loops = [body for body in loops if any(map(self.width, body))]
        return max(loops, key=len) if loops else self.shortest(code)

    def shortest(self, code: list[Instruction]) -> list[Instruction]:
        """The way of fewest instructions that takes an exponential."""
        ready = [(1, 0, False, [0])]
        seen = set()
        while ready:
            length, k, taken, path = heapq.heappop(ready)
            if (k, taken) in seen:
                continue
            seen.add((k, taken))
            taken |= bool(re.match(self.exponential, code[k].text))
            if taken and not code[k].falls and code[k].target is None:
                return [code[step] for step in path]
            following = [code[k].target] if code[k].target is not None else []
            for after in following + [k + 1] * code[k].falls:
                heapq.heappush(ready, (length + 1, after, taken, [*path, after]))
        raise ValueError("no way through the program takes an exponential")

    def figures(self, disassembly: str, logits: int, element: int) -> dict:
        """logits: of a thread, where no loop takes them; element: bytes that are loaded for each."""
        code = self.parse(disassembly)
        part = self.main_part(code)
        widths = [self.width(i) for i in part]
        if part[-1].target is not None:  # a loop, which compilers unroll
            logits = sum(widths) // element
        usual = max(set(widths), key=lambda width: width * widths.count(width))
        first = next((k for k, i in enumerate(part) if re.match(self.exponential, i.text)), len(part))
        return {
            "logits": logits,
            "instructions": round(len(part) / logits, 2),
            "exponentials": round(self.count(self.exponential, part) / logits, 2),
            "flops": round(sum(n * self.count(pattern, part) for pattern, n in self.flops.items()) / logits, 2),
            "load_bytes": usual,
            "loads_in_flight": sum(width == usual for width in widths[:first]),
            "tensor_core": self.count(self.tensor_core, code),
            "exchanges": self.count(self.exchange, code),
        }


def _sass(text: str) -> list[Instruction]:
    index, lines = {}, []
    for address, words in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]*);", text, re.M):
        index[int(address, 16)] = len(lines)
        if words.strip() != "NOP":
            lines.append(" ".join(words.split()))
    code = []
    for words in lines:
        always, words = not words.startswith("@"), re.sub(r"^@!?U?P\w+ ", "", words)
        jump = re.match(r"BRA\S*(.*) 0x([0-9a-f]+)", words)
        if jump:
            always &= not re.search(r"\bU?P\d", jump.group(1))
            code.append(Instruction(words, index[int(jump.group(2), 16)], not always))
        else:
            code.append(Instruction(words, None, not (always and words.startswith("EXIT"))))
    return code


def _gcn_lines(text: str) -> Iterator[str]:
    for line in text.split(".Lfunc_end")[0].splitlines():
        words = " ".join(line.split(";")[0].split())
        if re.match(r"\.LBB\w+:|[a-z]\w*_", words) and not re.match(r"s_(waitcnt|nop)", words):
            yield words


def _gcn(text: str) -> list[Instruction]:
    index, lines = {}, []
    for words in _gcn_lines(text):
        if words.endswith(":"):
            index[words[:-1]] = len(lines)
        else:
            lines.append(words)
    code = []
    for words in lines:
        jump = re.match(r"s_(c?branch)\S* (\S+)", words)
        # Threads that are masked out skip a load; of those that are not, none does
        if jump and not words.startswith("s_cbranch_execz"):
            code.append(Instruction(words, index[jump.group(2)], jump.group(1) == "cbranch"))
        else:
            code.append(Instruction(words, None, words != "s_endpgm"))
    return code


NVIDIA = Syntax(
    _sass,
    r"LDG\.E(?:\.(?!U?\d|S\d)\w+)*(?:\.([US]?\d+))?\b",
    {"": 4, "U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16},
    r"MUFU\.EX2",
    r"\w*(?:HMMA|HGMMA|QMMA|UTC\w*MMA)",
    r"SHFL|BAR|LDS|STS|REDUX",
    {r"FFMA2": 4, r"F(?:ADD|MUL)2": 2, r"FFMA(?!2)": 2, r"F(?:ADD|MUL)(?!2)|FMNMX|MUFU": 1},
)
AMD = Syntax(
    _gcn,
    r"(?:global|buffer)_load_(\w+)",
    {"dwordx4": 16, "dwordx2": 8, "dword": 4}
    | dict.fromkeys(("ushort", "sshort", "short_d16", "short_d16_hi"), 2)
    | dict.fromkeys(("ubyte", "sbyte"), 1),
    r"v_exp_f32",
    r"v_s?mfma",
    r"ds_|s_barrier|v_readlane|v_permlane|v_\w+_dpp",
    {r"v_pk_fma": 4, r"v_pk_(?:add|mul)_f32": 2, r"v_fmac?_f32": 2, r"v_(?:add|sub|mul|max|min|exp|rcp)\w*_f32": 1},
)
