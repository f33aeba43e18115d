-- read.lua: run one command that reads. Writes nothing.
--
-- KEYS     1 meta (hash)   then the keys of the command, which are its first arguments
-- ARGV     1 replica   2 the command   then its arguments after the keys
-- returns  { head, reply of the command }    head as in read_head.lua

local words = { ARGV[2] }
for i = 2, #KEYS do words[#words + 1] = KEYS[i] end
for i = 3, #ARGV do words[#words + 1] = ARGV[i] end
return { head, redis.call(unpack(words)) }
