"""For people: `doctor` looks after a store, `plan` says what a run will cost, `report` draws it, `interop` moves it, `console` shows it."""
