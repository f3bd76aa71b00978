"""A ledger worked out by hand, in decimal numbers and to the cent: every cost, a split, a dividend, a part-filled order, a future and a knock-out."""

from __future__ import annotations

from decimal import Decimal as D

import numpy as np
import pandas as pd

from mltrading.backtest.actions import lay_actions
from mltrading.backtest.bars import bars_of
from mltrading.backtest.costs import CostParams
from mltrading.backtest.engine import BacktestParams
from mltrading.backtest.events import Moment, run
from mltrading.backtest.instruments import Instrument
from mltrading.backtest.orders import Orders
from mltrading.market.panel import Panel, from_frame

DAYS = pd.to_datetime(["2024-03-04 21:00", "2024-03-05 21:00", "2024-03-06 21:00", "2024-03-07 21:00", "2024-03-08 21:00", "2024-03-11 21:00", "2024-03-12 21:00", "2024-03-13 21:00"], utc=True).as_unit("us")
A = [(100, 101, 99, 100), (100.5, 102, 100, 101), (101, 103, 100.5, 102), (51, 51.5, 50, 50.5), (50.5, 51, 49, 50), (50, 52, 49.5, 51), (51, 51.5, 50.5, 51), (51, 52, 50, 51.5)]
B = [(20, 20.2, 19.8, 20), (20.1, 20.4, 19.9, 20.2), (20.2, 20.3, 19.9, 20), (20, 20.1, 19.7, 19.8), (19.8, 20, 19.5, 19.6), (19.7, 19.9, 19.6, 19.8), (19.8, 20, 19.7, 19.9), (20, 20.1, 19.9, 20)]
F = [(4000, 4010, 3990, 4000), (4010, 4030, 4000, 4020), (4020, 4040, 3990, 4000), (4000, 4010, 3970, 3980), (3985, 4010, 3980, 4005), (4005, 4010, 4000, 4005), (4005, 4010, 4000, 4005), (4005, 4010, 4000, 4005)]
T = [(5, 5.1, 4.9, 5), (5.1, 5.3, 5, 5.2), (5.2, 5.3, 4.7, 4.8), (4.7, 4.8, 3.9, 4)]
VOLUME = {"A": [10_000] * 3 + [20_000] * 5, "B": [50_000] * 8, "F": [1000] * 8, "T": [100_000] * 4}
# liquidity is what the floors say, so that impact is 0.05 × 0.2 × sqrt(value / 100,000,000); 365 bps a year are 1 bp a day
COSTS = CostParams(commission_bps=10, commission_per_share=0.01, commission_minimum=5, half_spread_bps=20, slippage_bps=5, impact_coefficient=0.05, adv_bars=2, adv_floor_value=1e8, adv_assumed_value=1e8,
                   vol_floor_daily=0.2, borrow_bps_annual=365, margin_rate_annual_bps=730, participation=0.1, fill="open")
PARAMS = BacktestParams(initial_cash=60_000, delay_bars=0, max_gross=10, delist_after_bars=5, delist_haircut=0.5, start="panel")


def panel() -> Panel:
    rows = [(DAYS[d], s, *map(float, bar), float(VOLUME[s][d])) for s, bars in (("A", A), ("B", B), ("F", F), ("T", T)) for d, bar in enumerate(bars)]
    return from_frame(pd.DataFrame(rows, columns=["timestamp", "symbol", "open", "high", "low", "close", "volume"]).sort_values(["timestamp", "symbol"], ignore_index=True))


class Plan:
    """What is ordered at the close of each day."""

    def decide(self, now: Moment) -> Orders | None:
        nan = np.nan
        return {
            0: Orders(["A", "B", "F", "T"], [400, -3000, 2, 2000], life=1),
            1: Orders(["A", "B"], [1500, 1000], ["market", "limit"], limit=[nan, 19.8], life=[2, 0]),
            2: Orders(["A", "F"], [-800, -2], "stop", stop=[101, 3975]),
            4: Orders(["B"], [2000], life=1),
            5: Orders(["A"], [-2200], life=1),
            6: Orders(["A"], [-2], life=1),
        }.get(now.number)


def pays(quantity: str, reference: str, multiplier: str = "1", waited: bool = False) -> D:
    """What the account pays for a fill, negative where it receives: value at the fill price, and commission."""
    q, ref, m = D(quantity), D(reference), D(multiplier)
    value = abs(q) * ref * m
    rate = D(0) if waited else D("0.0020") + D("0.0005") + D("0.01") * (value / D(100_000_000)).sqrt()
    price = ref * (1 + rate * (1 if q > 0 else -1))
    commission = max(D("0.001") * abs(q) * m * price + D("0.01") * abs(q), D(5))
    return q * price * m + commission


def test_by_hand() -> None:
    prices = panel()
    actions = lay_actions(prices, pd.DataFrame({"timestamp": DAYS[[3, 3, 4]], "symbol": ["A", "A", "T"], "kind": ["split", "dividend", "settlement"], "value": [2.0, 0.4, 0.35]}))
    ledger = run(bars_of(prices, actions), prices.symbols, Plan(), COSTS, PARAMS, {"F": Instrument(multiplier=50, lot=1, margin=0.1, futures_style=True)})
    cash, equity = [D(60_000)], [D(60_000)]
    # Tuesday: 400 A at 100.5, 3,000 B sold short at 20.1, 2,000 T at 5.1, and two contracts at 4,010, which cost their commission and what they are worse than 4,000 by
    future = pays("2", "4010", "50") - 2 * 50 * D(4000)
    c = cash[0] - pays("400", "100.5") - pays("-3000", "20.1") - pays("2000", "5.1") - future
    c += 2 * 50 * (D(4020) - D(4000))  # the close of 4,020 is paid against 4,000
    cash.append(c)
    equity.append(c + 400 * D(101) - 3000 * D("20.2") + 2000 * D("5.2"))
    # Wednesday: one day of borrow on B at Tuesday's close; 1,000 of the 1,500 A, a tenth of the volume; the limit in B was not reached; the future loses 20 points
    c = c - 3000 * D("20.2") / 10_000 - pays("1000", "101") + 2 * 50 * (D(4000) - D(4020))
    cash.append(c)
    equity.append(c + 1400 * D(102) - 3000 * D(20) + 2000 * D("4.8"))
    assert c < 0
    # Thursday: borrow and two basis points of interest on what is owed; A is split, 2,800 shares receive 0.40 each; the other 500, now 1,000, are bought at 51; of the stop for 800 at 101, now 1,600 at
    # 50.5, only 1,000 find room; 1,000 B are bought back at their limit for commission alone; the future is sold at its stop of 3,975, settled against 4,000
    interest = -c * 2 / 10_000
    c = c - 3000 * D(20) / 10_000 - interest + 2800 * D("0.4") - pays("1000", "51") - pays("-1000", "50.5") - pays("1000", "19.8", waited=True)
    c -= pays("-2", "3975", "50") + 2 * 50 * D(4000)
    cash.append(c)
    equity.append(c + 2800 * D("50.5") - 2000 * D("19.8") + 2000 * D(4))
    # Friday: T is knocked out and pays 0.35; the rest of the stop, 600, goes at the open
    c = c - 2000 * D("19.8") / 10_000 - max(-c, D(0)) * 2 / 10_000 + 2000 * D("0.35") - pays("-600", "50.5")
    cash.append(c)
    equity.append(c + 2200 * D(50) - 2000 * D("19.6"))
    # Monday: three days of borrow and interest; B is closed at 19.7
    c = c - 3 * 2000 * D("19.6") / 10_000 - 3 * max(-c, D(0)) * 2 / 10_000 - pays("2000", "19.7")
    cash.append(c)
    equity.append(c + 2200 * D(51))
    # Tuesday: 2,000 of 2,200 A are sold, the rest lapses
    c = c - max(-c, D(0)) * 2 / 10_000 - pays("-2000", "51")
    cash.append(c)
    equity.append(c + 200 * D(51))
    # Wednesday: two shares, for which the minimum of 5.00 is charged
    c = c - pays("-2", "51")
    cash.append(c)
    equity.append(c + 198 * D("51.5"))
    np.testing.assert_allclose(ledger.equity["cash"], [float(x) for x in cash], atol=0.005, rtol=0)
    np.testing.assert_allclose(ledger.equity["equity"], [float(x) for x in equity], atol=0.005, rtol=0)
    assert abs(ledger.equity["interest"].iloc[3] - float(interest)) < 0.005
    assert ledger.equity["dividends"].tolist() == [0, 0, 0, 1120, 0, 0, 0, 0]
    assert len(ledger.fills) == 14
    assert ledger.fills["kind"].value_counts().to_dict() == {"order": 13, "settlement": 1}
    assert ledger.orders["status"].tolist() == ["filled"] * 9 + ["partial", "filled"]
    assert ledger.orders.loc[ledger.orders["order"] == 4, ["quantity", "filled"]].iloc[0].tolist() == [3000, 3000]
    assert (ledger.fills[["commission", "spread_cost", "slippage_cost", "impact_cost"]] > 0).any().all()
