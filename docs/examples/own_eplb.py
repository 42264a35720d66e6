"""Expert maps of one's own, judged: `python own_eplb.py LOADS.json MAPS.json`, then

refimpl eplb LOADS.json --gpus 8 --slots 40 --check MAPS.json
"""

import heapq
import json
import sys

import numpy as np

if len(sys.argv) != 3:
    sys.exit(__doc__)
GPUS, SLOTS = 8, 40


def replicated(load):
    """Slots for each expert: the next one always to the expert whose replicas have the most to do."""
    count = np.ones(len(load), int)
    for _ in range(SLOTS - len(load)):
        count[np.argmax(load / count)] += 1
    return count


def placed(load, count):
    """Heaviest replica first, to the GPU with the least to do that has room. -> (SLOTS,) expert of every slot."""
    gpus, room = [(0.0, g) for g in range(GPUS)], [[] for _ in range(GPUS)]
    for expert in sorted(np.repeat(np.arange(len(load)), count), key=lambda e: -load[e] / count[e]):
        least, g = heapq.heappop(gpus)
        room[g].append(int(expert))
        if len(room[g]) < SLOTS // GPUS:
            heapq.heappush(gpus, (least + load[expert] / count[expert], g))
    return [expert for of_gpu in room for expert in of_gpu]


loads = (
    np.random.default_rng(0).lognormal(sigma=1.0, size=(2, 32)).round(3)
)  # yours: tokens of each expert, layers x experts
maps = [placed(load, replicated(load)) for load in loads]
for path, content in zip(sys.argv[1:], (loads.tolist(), {"phy2log": maps}), strict=True):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)
