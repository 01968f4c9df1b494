"""What carries every adapter: the contract of a method (`method`), rows routed to adapters (`routing`), and what these
do to a frozen model where they touch it (`in_force`, `sites`, with `rows`, `tokens` and `weights` for what a site has
before it). `attach` has what is done with adapters: attach, route, activate, count, detach."""
