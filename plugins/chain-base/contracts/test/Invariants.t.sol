// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {Handler} from "./Handler.sol";

contract InvariantsTest {
    Handler internal handler;

    function setUp() public {
        handler = new Handler();
    }

    struct FuzzSelector {
        address addr;
        bytes4[] selectors;
    }

    function targetContracts() external view returns (address[] memory list) {
        list = new address[](1);
        list[0] = address(handler);
    }

    /// @dev The steps that everything else waits for are listed more than once.
    function targetSelectors() external view returns (FuzzSelector[] memory list) {
        list = new FuzzSelector[](1);
        list[0] = FuzzSelector(address(handler), steps());
    }

    function steps() internal pure returns (bytes4[] memory list) {
        bytes4[32] memory all = [
            Handler.post.selector, Handler.post.selector, Handler.post.selector,
            Handler.claim.selector, Handler.claim.selector, Handler.claim.selector,
            Handler.deliver.selector, Handler.deliver.selector, Handler.deliver.selector,
            Handler.prove.selector, Handler.prove.selector,
            Handler.challenge.selector, Handler.challenge.selector,
            Handler.open.selector, Handler.open.selector,
            Handler.settle.selector, Handler.settle.selector,
            Handler.postOfToken.selector, Handler.postWithFeeToken.selector, Handler.abandon.selector, Handler.cancel.selector,
            Handler.accept.selector, Handler.resolve.selector, Handler.expire.selector, Handler.topUp.selector,
            Handler.settleMany.selector, Handler.settleAndClose.selector, Handler.close.selector, Handler.finalize.selector,
            Handler.withdraw.selector, Handler.nodeStep.selector, Handler.warp.selector
        ];
        list = new bytes4[](37);
        for (uint256 i = 0; i < 32; ++i) list[i] = all[i];
        (list[32], list[33]) = (Handler.pause.selector, Handler.stranger.selector);
        (list[34], list[35], list[36]) = (Handler.outlast.selector, Handler.prove.selector, Handler.prove.selector);
    }

    /// @dev One function, because forge walks anew for each.
    function invariant_coin_is_whole_and_nobody_did_what_they_may_not() external view {
        handler.checkMoney();
        string memory breach = handler.breach();
        require(bytes(breach).length == 0, breach);
    }

    function afterInvariant() external {
        handler.drain();
    }

    mapping(string step => uint256) private _did;

    /// @dev The invariants mean little if the steps never take effect: a few long walks must reach every end that there is.
    function test_random_walks_reach_every_end() external {
        string[36] memory ends = [
            "postJob", "token posts", "fee token refused", "claimJob", "submitResult", "submitProof", "submitProof challenged",
            "abandonJob", "cancelJob", "acceptResult", "challenge", "resolve for host", "resolve for client", "expire Open",
            "expire Claimed", "expire Delivered", "expire Proven", "expire Challenged", "openSession", "topUp", "settle",
            "settleMany", "settleAndClose", "close by host", "close by client", "finalizeSession", "withdraw", "addStake",
            "setHotKey", "setPayout", "beginExit", "register", "stranger refused", "job settled", "job refunded", "session settled"
        ];
        for (uint256 w = 0; w < 4; ++w) {
            if (w != 0) handler = new Handler();
            _walk(w, 500);
            // What drain() does at the end must not count as reached.
            for (uint256 i = 0; i < ends.length; ++i) _did[ends[i]] += handler.did(ends[i]);
            handler.drain();
        }
        for (uint256 i = 0; i < ends.length; ++i) require(_did[ends[i]] != 0, string.concat("never reached: ", ends[i]));
    }

    function _walk(uint256 walk, uint256 length) private {
        bytes4[] memory list = steps();
        for (uint256 i = 0; i < length; ++i) {
            bytes32 seed = keccak256(abi.encode(walk, i));
            bytes4 selector = list[uint256(seed >> 200) % list.length];
            (bool ok, bytes memory why) = address(handler).call(bytes.concat(selector, _args(selector, seed)));
            if (!ok) {
                assembly ("memory-safe") {
                    revert(add(why, 32), mload(why))
                }
            }
        }
        handler.checkMoney();
        string memory breach = handler.breach();
        require(bytes(breach).length == 0, breach);
    }

    function _args(bytes4 s, bytes32 seed) private pure returns (bytes memory) {
        uint256 a = uint256(seed) >> 128;
        uint256 b = uint64(uint256(seed));
        uint256 bit = b >> 7 & 1;
        if (s == Handler.post.selector) return abi.encode(a, b >> 3, uint128(a), uint64(b));
        if (s == Handler.postOfToken.selector) return abi.encode(uint128(a));
        if (s == Handler.postWithFeeToken.selector) return abi.encode(a, uint128(a));
        if (s == Handler.deliver.selector) return abi.encode(a, uint64(b), uint64(a));
        if (s == Handler.prove.selector || s == Handler.nodeStep.selector || s == Handler.outlast.selector) return abi.encode(a, uint8(b));
        if (s == Handler.accept.selector || s == Handler.challenge.selector || s == Handler.close.selector) return abi.encode(a, bit);
        if (s == Handler.resolve.selector) return abi.encode(a, b >> 8 & 1, bit, uint16(b >> 16));
        if (s == Handler.open.selector) return abi.encode(a, a >> 8, b >> 3, uint128(a), uint64(b));
        if (s == Handler.topUp.selector) return abi.encode(a, uint128(a));
        if (s == Handler.settle.selector || s == Handler.settleAndClose.selector) return abi.encode(a, b, b >> 9 & b >> 10 & 1);
        if (s == Handler.settleMany.selector) return abi.encode(a, b, uint8(b >> 8));
        if (s == Handler.withdraw.selector) return abi.encode(a, b, bit);
        if (s == Handler.warp.selector) return abi.encode(uint32(b), b >> 9 & b >> 10 & b >> 11 & 1);
        if (s == Handler.pause.selector) return abi.encode(uint8(b));
        if (s == Handler.stranger.selector) return abi.encode(a, uint8(b), bit);
        return abi.encode(a, b);
    }
}
