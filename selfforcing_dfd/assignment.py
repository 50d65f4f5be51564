"""Minimum-cost assignment, in plain Python: groups of samples that share a caption are small."""

from __future__ import annotations


def assign(cost: list[list[float]]) -> list[int]:
    """Column of each row in the assignment of least total cost (Kuhn 1955; shortest augmenting
    paths, O(n^3)).
    """
    n = len(cost)
    row_price, column_price = [0.0] * n, [0.0] * (n + 1)
    row_of = [-1] * (n + 1)  # the extra column is where each new row starts its search
    for row in range(n):
        column, row_of[n] = n, row
        distance, came_from, done = [float("inf")] * n, [n] * n, [False] * (n + 1)
        while row_of[column] >= 0:
            done[column], i = True, row_of[column]
            for j in (j for j in range(n) if not done[j]):
                reduced = cost[i][j] - row_price[i] - column_price[j]
                if reduced < distance[j]:
                    distance[j], came_from[j] = reduced, column
            column = min((j for j in range(n) if not done[j]), key=distance.__getitem__)
            step = distance[column]
            for j in range(n + 1):
                if done[j]:
                    row_price[row_of[j]] += step
                    column_price[j] -= step
                elif j < n:
                    distance[j] -= step
        while column != n:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    columns = [0] * n
    for j in range(n):
        columns[row_of[j]] = j
    return columns
