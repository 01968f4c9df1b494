"""What carries every adapter: the contract of a method (`method`), rows routed to adapters (`routing`), what a route
does at each site (`in_force`, with `rows`, `tokens` and `weights` for what a site has before it), and what stands at
the sites (`hooks`, `attention`, put there by `sites`): all that an adapter does to a frozen model passes through these.
`attach` has what is done with adapters: attach, route, activate, count, detach."""
