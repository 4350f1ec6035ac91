# gptcli at fish's command line: completions of the line by a warm model.
#
# @KEY@ inserts the likeliest at the cursor; pressed again it goes on to the next one, and at last back to what was there.
# Where no model is warm, it says so above the line. It only ever writes on the line. gptcli-unload takes all of it away.
# There is no ghost text: what fish shows behind the line is its own, and it tells nobody that a key was typed.

functions -q gptcli-unload; and gptcli-unload

set -g _gptcli_socket @SOCKET@ # of the model's warm process
set -g _gptcli_num @NUM@
set -g _gptcli_until @UNTIL@
set -g _gptcli_min_prob @MIN_PROB@
set -g _gptcli_seconds @SECONDS@ # that the search may take
set -g _gptcli_limit @LIMIT@ # seconds after which nobody waits for the answer any more
set -g _gptcli_command @COMMAND@ # asks where there is no curl
set -g _gptcli_cold @COLD@ # what the key says where no model is warm

set -g _gptcli_texts # the answer
set -g _gptcli_at 0 # which of its texts stands on the line; 0: none
set -g _gptcli_left # the line that was asked about, to the left and to the right of the cursor
set -g _gptcli_right

function _gptcli_press
    set -l whole (commandline -b | string collect)
    set -l at (commandline -C)
    set -l left (string sub -l $at -- $whole | string collect)
    set -l right (string sub -s (math $at + 1) -- $whole | string collect)
    set -l shown ''
    test $_gptcli_at -gt 0; and set shown $_gptcli_texts[$_gptcli_at]
    if set -q _gptcli_texts[1]; and test "$left" = "$_gptcli_left$shown"; and test "$right" = "$_gptcli_right"
        set _gptcli_at (math "($_gptcli_at + 1) % ($(count $_gptcli_texts) + 1)")
    else
        set _gptcli_left "$left"
        set _gptcli_right "$right"
        set _gptcli_at 0
        set _gptcli_texts (_gptcli_ask "$left" "$right")
        test $status -eq 7; and _gptcli_say "$left"
        set -q _gptcli_texts[1]; or return 0
        set _gptcli_at 1
    end
    set shown ''
    test $_gptcli_at -gt 0; and set shown $_gptcli_texts[$_gptcli_at]
    commandline -r -- "$_gptcli_left$shown$_gptcli_right"
    commandline -C (string length -- "$_gptcli_left$shown")
end

# Say that no model is warm, below what stands on the line, which is then drawn anew below that.
function _gptcli_say # LEFT
    printf '\n\e[J%s\n' $_gptcli_cold
    # fish draws as many rows above as there are before the cursor's: those of the prompt, and those of the text.
    set -l prompt (fish_prompt)
    set -l rows (math (count $prompt) - 1)
    set -l before (string length --visible -- "$prompt[-1]" 2>/dev/null)
    for line in (string split \n -- "$argv")
        set -l wide (string length --visible -- "$line" 2>/dev/null)
        set rows (math "$rows + floor((0$before + 0$wide) / $COLUMNS) + 1")
    end
    test $rows -gt 1; and string repeat -N -n (math $rows - 1) \n
    commandline -f repaint
end

function _gptcli_ask # LEFT RIGHT; 7: nobody is there
    test -S $_gptcli_socket; or return 7
    _gptcli_answer $argv 2>/dev/null | string replace -r '^[^\t]*\t' '' |
        string replace -ar '[[:cntrl:]]' '' | string match -r '.+'
    return $pipestatus[1] # curl's, which has 7 for a socket without its process
end

# Typed text is nobody else's business: it goes through pipes, never through arguments.
function _gptcli_answer # LEFT RIGHT
    set -l left (string sub -s -4000 -- "$argv[1]" | string collect)
    set -l right (string sub -l 400 -- (string split -m 1 \n -- "$argv[2]")[1])
    if command -q curl
        begin
            echo 'data-urlencode = "prefix='(_gptcli_quoted "$left")'"'
            echo 'data-urlencode = "suffix='(_gptcli_quoted "$right")'"'
        end | command curl -qsf -m $_gptcli_limit --unix-socket $_gptcli_socket -K - \
            -d num=$_gptcli_num -d until=$_gptcli_until -d min_prob=$_gptcli_min_prob \
            -d deadline_seconds=$_gptcli_seconds http://localhost/gptcli/complete
    else
        set -lx GPTCLI_SUFFIX "$right"
        printf %s "$left" | command $_gptcli_command --num $_gptcli_num --until $_gptcli_until \
            --min-prob $_gptcli_min_prob --deadline $_gptcli_seconds -
    end
end

function _gptcli_quoted
    string replace -a \\ \\\\ -- "$argv" | string replace -a \" \\\" | string join '\\n' | string collect
end

function gptcli-unload
    for mode in default insert
        # Whoever has bound the key since then keeps it; what fish itself binds comes back.
        string match -q '*_gptcli_press*' -- (bind -M $mode --user @BINDING@ 2>/dev/null)
        and bind -M $mode -e --user @BINDING@
    end
    for before in $_gptcli_before
        eval $before
    end
    functions -e (functions -a | string match '_gptcli_*') gptcli-unload
    set -e (set -n | string match '_gptcli_*')
end

set -g _gptcli_before
for mode in default insert
    set -a _gptcli_before (bind -M $mode --user @BINDING@ 2>/dev/null)
    bind -M $mode @BINDING@ _gptcli_press
end
