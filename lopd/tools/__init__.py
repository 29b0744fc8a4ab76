"""For people: `doctor` looks after a store, `plan` foretells a run, `report` draws it, `interop` moves it, `share` pushes it, `console` shows it."""
