"""Where ranks live: layouts, their memory and time, simulation, preflight and launch. No torch: it runs on a laptop."""
