-- recovery.lua (part): a batch that replays what the store has lost (P13). Reservations wait meanwhile.

-- Replays may be many, and may arrive late: nothing is granted until a second after the last of them.
call('HSET', KEYS[1], 'recovering_until', text(max(now_ms + 1000, recovering and recovering + 0 or 0)))
dirty = true
recovering = nil -- for this batch, an id without a record is lost
