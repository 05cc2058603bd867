"""How much loss FP4 costs: many short runs that differ in the recipe alone, their table, and the law behind them."""
